"""The attention kernels against the plain twin in float64, at the edges of their tiles, and as operators of torch."""

import bisect
import math

import pytest
import torch
import triton
import triton.language as tl

from kernels.fused import attention as module
from kernels.fused.attention import attention
from kernels.fused.attention_geometry import find_tile
from kernels.fused.launch import launch
from kernels.plain.attention import attention as twin
from kernels.random import drop_threshold, fork

SHORT = [37, 1, 64, 0, 128, 90]  # one program a sequence and head
LONG = [200, 1, 129, 0, 90]
CASES = [(torch.float64, 2, 32), (torch.float32, 1, 64), (torch.float16, 1, 64), (torch.bfloat16, 1, 128)]


def make(lengths, dtype=torch.float64, heads=1, dim=32):
    """Packed queries, keys and values, a gradient of the output, and the arguments that name the sequences."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, grad, (torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0))


def dropped(tokens, p=0.25):
    return {"dropout_p": p, "dropout_keys_t": fork(5, torch.arange(tokens)), "site": 9}


def run(function, qkv, grad, sequences, **options):
    """The output, and the gradient of the queries, keys and values."""
    qkv = qkv.clone().requires_grad_()
    out = function(qkv, *sequences, **options)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    return out.detach(), grad_qkv


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(("dtype", "heads", "dim"), CASES)
def test_as_exact_as_the_twin_but_for_the_rounding_of_weights(dtype, heads, dim, lengths):
    """Beside what the twin rounds, 16-bit kernels round each softmax weight and its gradient.

    For inputs from N(0, 1) that makes less than twice the twin's error. Where scores are larger it may make more.
    """
    qkv, grad, sequences = make(lengths, dtype, heads, dim)
    exact = run(twin, qkv.double(), grad.double(), sequences)
    for truth, plain, ours in zip(exact, run(twin, qkv, grad, sequences), run(attention, qkv, grad, sequences), strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        error, allowed = ((result.double() - truth).square().mean().sqrt() for result in (ours, plain))
        assert error <= 1.7 * allowed + 1e-15
        error, allowed = ((result.double() - truth).abs().max() for result in (ours, plain))
        assert error <= 2.5 * allowed + 1e-13


@pytest.mark.parametrize("lengths", [[9, 1, 30], [140, 1]])
def test_dropout_drops_the_weights_that_the_twin_drops(lengths):
    qkv, grad, sequences = make(lengths, heads=3)
    options = dropped(sum(lengths))
    for plain, ours in zip(
        run(twin, qkv, grad, sequences, **options), run(attention, qkv, grad, sequences, **options), strict=True
    ):
        assert (ours - plain).abs().max() <= 1e-13


def test_the_gradient_of_fp32_is_exact_where_slopes_are_steep(monkeypatch):
    """The first of 16 heads takes 0.7 a token: what ALiBi adds must not swallow the digits of the score."""
    queries = {"attention_backward_dkdv": 32}  # the others may be large: the interpreter counts tiles
    monkeypatch.setattr(module, "tile", lambda kernel, **_: {"BLOCK_M": queries.get(kernel, 128), "BLOCK_N": 128})
    qkv, grad, sequences = make([200], torch.float32, heads=16)
    exact = run(twin, qkv.double(), grad.double(), sequences)
    for true, ours in zip(exact, run(attention, qkv, grad, sequences), strict=True):
        assert (ours - true).abs().max() <= 2e-6 * true.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("lengths", "p"), [([37, 0, 64], 0.0), ([70, 1, 130], 0.25)])
def test_nothing_outside_of_the_tensors_is_read_or_written(lengths, p, monkeypatch):
    """Zones round all of a launch's tensors stay as they are and reach no result; nor do values never written.

    They hold NaN, or the largest integer where there are integers.
    """
    qkv, grad, sequences = make(lengths, torch.float32)
    options = dropped(sum(lengths), p)
    expected = run(attention, qkv, grad, sequences, **options)

    def guarded_launch(kernel, grid, *args, **constants):
        guarded, zones = [], []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                outside = math.nan if arg.is_floating_point() else torch.iinfo(arg.dtype).max
                zone = torch.full((arg.numel() + 8192,), outside, dtype=arg.dtype)
                inner = zone[4096:-4096].view(arg.shape).copy_(arg)
                zones.append((arg, inner, zone, zone[:4096].clone()))
                arg = inner
            guarded.append(arg)
        launch(kernel, grid, *guarded, **constants)
        for arg, inner, zone, before in zones:
            assert all(torch.equal(side.view(torch.uint8), before.view(torch.uint8)) for side in (zone[:4096], zone[-4096:]))
            arg.copy_(inner)

    monkeypatch.setattr(module, "launch", guarded_launch)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        results = run(attention, qkv, grad, sequences, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("longest", [30, 129])
def test_the_last_token_may_lie_more_than_2_to_the_31_elements_from_the_first(longest, monkeypatch, programs_from):
    """Of the tensors of up to 13 GB only the last 30 tokens are ever touched. 129: the kernels for long sequences."""
    start, length = 2**26 + 64, 30  # outputs, too: 32 elements a token
    qkv, grad, _ = make([length], torch.bfloat16)
    expected = run(attention, qkv, grad, (torch.tensor([0, length], dtype=torch.int32), longest))

    def last_programs(kernel, grid, *args, **options):
        if longest > module.SHORT:
            programs_from(start // options["BLOCK_N" if kernel is module.attention_backward_dkdv else "BLOCK_M"])
            grid = 1, 1
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(module, "launch", last_programs)
    qkv_far, grad_far = (torch.empty(start + length, *x.shape[1:], dtype=x.dtype) for x in (qkv, grad))
    qkv_far[start:], grad_far[start:] = qkv, grad
    place = torch.tensor([start, start + length], dtype=torch.int32), longest
    out, lse = module._forward_op(qkv_far, *place, None, 0, 0)
    grad_qkv = module._backward_op(grad_far, qkv_far, out, lse, *place, None, 0, 0)
    assert torch.equal(out[start:], expected[0]) and torch.equal(grad_qkv[start:], expected[1])


@triton.jit
def find_kernel(programs, cu_seqlens, sequences, found, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    for n in tl.static_range(COUNT):
        start, length, row, first = find_tile(tl.load(programs + n), cu_seqlens, sequences, BLOCK)
        tl.store(found + 4 * n, start)
        tl.store(found + 4 * n + 1, length)
        tl.store(found + 4 * n + 2, row)
        tl.store(found + 4 * n + 3, first)


@pytest.mark.parametrize("sequences", [1, 128, 129, 300, 20_000])
def test_a_program_finds_its_sequence_in_a_batch_of_any_size(sequences):
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(-50, 300, (sequences,), generator=generator).clamp(min=0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    starts, block = cu_seqlens.tolist(), 64
    begins = [start // block + number for number, start in enumerate(starts[:-1])]
    last = starts[-1] // block + sequences - 1
    programs = [0, 1, last - 1, last, *torch.randint(0, last + 1, (28,), generator=generator).tolist()]
    programs = [max(0, program) for program in programs]
    expected = []
    for program in programs:
        number = bisect.bisect_right(begins, program) - 1
        start, first = starts[number], (program - begins[number]) * block
        expected.append([start, starts[number + 1] - start, (start // 16 + number) * 16, first])
    found = torch.zeros(len(programs), 4, dtype=torch.int32)
    launch(
        find_kernel,
        (1,),
        *(torch.tensor(programs, dtype=torch.int32), cu_seqlens, sequences, found),
        device=found.device,
        COUNT=len(programs),
        BLOCK=block,
    )
    assert found.tolist() == expected


@pytest.mark.parametrize("lengths", [[40, 100], [150, 210]])
def test_a_sequence_has_the_same_bits_whatever_is_beside_it(lengths):
    """As long as the longest of the batch stays on one side of 128 tokens: there are other kernels on the other."""
    qkv, grad, sequences = make(lengths, torch.bfloat16)
    first, last = lengths
    together = run(attention, qkv, grad, sequences)
    alone = run(attention, qkv[first:], grad[first:], (torch.tensor([0, last], dtype=torch.int32), last))
    assert all(torch.equal(a[first:], b) for a, b in zip(together, alone, strict=True))


def test_ten_thousand_tokens(monkeypatch):
    """Few queries have a gradient, so that the formula in float64 needs no more than their rows."""
    tokens, dim, picked = 10_240, 32, torch.tensor([0, 1, 3000, 5119, 10_239])
    tiles = {"BLOCK_M": 1024, "BLOCK_N": 1024}, {"BLOCK_M": 128, "BLOCK_N": 4096}  # large: the interpreter counts tiles
    monkeypatch.setattr(module, "tile", lambda kernel, **_: tiles[kernel.endswith("dkdv")])
    qkv, grad, sequences = make([tokens], torch.float32)
    grad[torch.isin(torch.arange(tokens), picked, invert=True)] = 0
    out, grad_qkv = run(attention, qkv, grad, sequences)

    exact = qkv.double().requires_grad_()
    q, k, v = exact[:, :, 0].unbind(1)
    distance = (picked[:, None] - torch.arange(tokens)).abs()
    expected = (q[picked] @ k.T / math.sqrt(dim) - 2**-8 * distance).softmax(-1) @ v
    expected.backward(grad[picked, 0].double())
    assert (out[picked, 0] - expected).abs().max() <= 1e-6
    assert (grad_qkv - exact.grad).abs().max() <= 1e-6


@pytest.mark.parametrize(("lengths", "p"), [([3, 1, 2], 0.0), ([3, 1, 2], 0.25), ([130], 0.0)])
def test_the_gradient_by_finite_differences(lengths, p):
    qkv, _, sequences = make(lengths)
    options = dropped(sum(lengths), p)
    assert torch.autograd.gradcheck(lambda x: attention(x, *sequences, **options), (qkv.requires_grad_(),), fast_mode=True)


def test_a_sequence_of_one_token_returns_its_value_and_any_strides_will_do():
    qkv, _, sequences = make([3, 1, 2], heads=2)
    strided = qkv.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    out = attention(strided, *sequences)
    assert torch.equal(out[3], qkv[3, 2])
    out.sum().backward()
    (_, expected) = run(twin, qkv, torch.ones(6, 2, 32, dtype=torch.float64), sequences)
    assert (strided.grad - expected).abs().max() <= 1e-14


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0]])
def test_an_empty_batch_has_a_gradient(cu_seqlens):
    qkv = torch.zeros(0, 3, 2, 32, requires_grad=True)
    out = attention(qkv, torch.tensor(cu_seqlens, dtype=torch.int32), 0)
    assert out.shape == (0, 2, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_the_operators_keep_the_rules_of_torch():
    qkv, grad, (cu_seqlens, longest) = make([5, 3], torch.float32)
    rest = (cu_seqlens, longest, fork(5, torch.arange(8)), 9, drop_threshold(0.25))
    # Not "test_aot_dispatch_dynamic": it compares all that is returned, and places between two sequences' statistics are
    # never written. The next test stands in for it.
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._forward_op, (qkv.requires_grad_(), *rest), test_utils=rules)
    with torch.no_grad():
        out, lse = module._forward_op(qkv, *rest)
    torch.library.opcheck(module._backward_op, (grad, qkv.detach(), out, lse, *rest), test_utils=rules)


def test_torch_compile_keeps_it_in_the_graph():
    qkv, grad, sequences = make([20, 9], torch.float32)
    compiled = torch.compile(lambda *args: attention(*args) * 2, fullgraph=True, backend="aot_eager")
    results, expected = run(compiled, qkv, grad, sequences), run(attention, qkv, 2 * grad, sequences)
    assert torch.equal(results[0], 2 * expected[0]) and torch.equal(results[1], expected[1])
