"""Dropout + residual + LayerNorm: kernels against their plain twin in float64, forward and backward."""

import math

import pytest
import torch

from kernels.fused import layer_norm as module
from kernels.fused.dropout import dropout
from kernels.fused.launch import launch
from kernels.fused.layer_norm import dropout_residual_layer_norm
from kernels.plain.layer_norm import dropout_residual_layer_norm as twin
from kernels.random import fork, keep_mask

KEYS = fork(5, torch.arange(11))
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def make(dtype, hidden, tokens=11, weights=None):
    """x, residual, weight, bias, and the gradients of the two outputs."""
    generator = torch.Generator().manual_seed(hidden)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=FP64)

    weight, bias = 1 + 0.1 * draw(hidden), 0.1 * draw(hidden)
    tensors = [draw(tokens, hidden), draw(tokens, hidden), weight, bias, draw(tokens, hidden), draw(tokens, hidden)]
    return [tensor.to(weights or dtype if i in (2, 3) else dtype) for i, tensor in enumerate(tensors)]


def run(function, tensors, p=0.1, gradients=(True, True), residual=True):
    """The two outputs, and the gradients of x, residual, weight, bias."""
    *inputs, dy, dy_again = tensors
    leaves = [x.clone().requires_grad_() for x in inputs]
    x, z, weight, bias = leaves
    site = {"dropout_p": p, "dropout_keys_t": KEYS[: len(x)], "site": 9}
    y, y_again = function(x, z if residual else None, weight, bias, 1e-12, **site)
    sum((out * d).sum() for out, d, use in ((y, dy, gradients[0]), (y_again, dy_again, gradients[1])) if use).backward()
    return [y.detach(), y_again.detach()] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_as_exact_as_the_twin(tensors, **options):
    exact = run(twin, [x.double() for x in tensors], **options)
    plain, ours = run(twin, tensors, **options), run(dropout_residual_layer_norm, tensors, **options)
    assert len(ours) == len(exact)
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, i
        error, allowed = ((result.double() - true).abs().max() for result in (mine, theirs))
        # The weight's gradient is a sum of as many rounding errors of y as there are rows, none of which the twin makes.
        factor = 3 if i == len(exact) - 2 else 2
        rounding = torch.finfo(torch.promote_types(mine.dtype, FP32)).eps
        assert error <= factor * allowed + 4 * rounding * true.abs().max(), i


@pytest.mark.parametrize(
    ("dtype", "hidden"), [(FP64, 64), (FP32, 192), (FP32, 768), (BF16, 64), (BF16, 192), (BF16, 768), (FP16, 768)]
)
def test_no_less_exact_than_the_twin(dtype, hidden):
    assert_as_exact_as_the_twin(make(dtype, hidden))


@pytest.mark.parametrize(("dtype", "hidden"), [(FP32, 1088), (BF16, 3136), (BF16, 6208)])
def test_rows_that_need_more_than_a_warp(dtype, hidden):
    assert_as_exact_as_the_twin(make(dtype, hidden, tokens=3))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("residual", [True, False])
def test_with_and_without_dropout_and_residual(residual, p):
    assert_as_exact_as_the_twin(make(BF16, 192), p=p, residual=residual)


@pytest.mark.parametrize("gradients", [(True, False), (False, True)])
def test_either_gradient_alone(gradients):
    assert_as_exact_as_the_twin(make(FP32, 192), gradients=gradients)


def test_fp32_weights_with_a_bf16_input():
    assert_as_exact_as_the_twin(make(BF16, 192, weights=FP32))


def test_the_residual_of_another_dtype():
    """Under autocast the first residual is fp32."""
    x, residual, *rest = make(BF16, 192)
    assert_as_exact_as_the_twin([x, residual.float(), *rest])


def test_the_mask_is_the_twins():
    x = torch.full((11, 192), 8.0)
    weight, bias = torch.ones(192), torch.zeros(192)
    y, _ = dropout_residual_layer_norm(x, None, weight, bias, 1e-12, dropout_p=0.3, dropout_keys_t=KEYS, site=9)
    assert torch.equal(y > 0, keep_mask(KEYS, 9, 192, 0.3))  # what is dropped lies below the mean


def test_both_outputs_are_the_same_memory():
    y, y_again = dropout_residual_layer_norm(*make(BF16, 64)[:4], 1e-12)
    assert y.data_ptr() == y_again.data_ptr() and torch.equal(y, y_again)


@pytest.mark.parametrize("value", [3.0, 0.1, -1000.3])
def test_a_constant_row_is_its_bias(value):
    """Its variance is 0, so 1 / sqrt(eps) = 10^6 blows up whatever rounding leaves of the row."""
    x, _, weight, bias, *_ = make(FP32, 768)
    y, _ = dropout_residual_layer_norm(torch.full_like(x, value), None, weight, bias, 1e-12)
    torch.testing.assert_close(y, bias.expand_as(y), rtol=0, atol=1e-6)


def test_the_mean_may_be_large():
    x, _, weight, bias, *_ = make(FP32, 768)
    y, _ = dropout_residual_layer_norm(x + 1000, None, weight, bias, 1e-12)
    expected, _ = twin((x + 1000).double(), None, weight.double(), bias.double(), 1e-12)
    assert (y - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_columns_of_tiny_weight_cost_no_more_than_their_own_part_of_the_gradient(dtype):
    """xhat can't be rebuilt where the bias swallows weight * xhat. It is taken as 0 there instead of blown up."""
    tensors = make(dtype, 768)
    tiny = slice(0, None, 16)
    tensors[2][tiny] = torch.tensor([0.0, 1e-30, 1e-9, -1e-5] * 12).to(dtype)
    tensors[3][tiny] = 0.5
    exact = run(twin, [x.double() for x in tensors])
    ours = run(dropout_residual_layer_norm, tensors)
    assert all(x.isfinite().all() for x in ours)
    rounding = torch.finfo(dtype).eps
    covariance = 3 / math.sqrt(768)  # between the gradient and xhat, over the columns of a row: by chance
    for mine, true in zip(ours[2:4], exact[2:4], strict=True):
        error, size = (mine.double() - true).abs(), true.square().mean().sqrt()
        assert error[:, tiny].max() <= 8 * covariance * size
        error[:, tiny] = 0
        assert error.max() <= (0.02 + 8 * rounding) * size  # through the row's covariance only
    dweight, expected = ours[4].double(), exact[4]
    assert (dweight[tiny][0::4] == 0).all()
    dweight[tiny] = expected[tiny] = 0
    assert (dweight - expected).abs().max() <= 8 * rounding * expected.abs().max()


def test_the_bias_may_be_twenty_times_the_weight():
    """The xhat that backward rebuilds from a bf16 y has a twelfth of its size in rounding errors then."""
    tensors = make(BF16, 768, tokens=64)
    tensors[2:4] = torch.full((768,), 0.1).bfloat16(), torch.full((768,), 2.0).bfloat16()
    exact = run(twin, [x.double() for x in tensors], p=0.0)
    ours = run(dropout_residual_layer_norm, tensors, p=0.0)
    for i, allowed in ((2, 0.005), (3, 0.005), (4, 0.06), (5, 0.005)):  # dx, dresidual, dweight, dbias
        assert (ours[i].double() - exact[i]).norm() <= allowed * exact[i].norm(), i


def test_partial_sums_of_a_whole_gpu_are_added_up():
    """Under the interpreter there are four programs, on an H100 264."""
    partials = torch.randn(264, 2, 192, generator=torch.Generator().manual_seed(0), dtype=FP64)
    sums = torch.empty(2, 192, dtype=FP64)
    launch(
        module.layer_norm_sum_kernel, (2, 2), partials, *sums, 264, HIDDEN=192, PROGRAMS=32, COLUMNS=128, device=sums.device
    )
    torch.testing.assert_close(sums, partials.sum(0), rtol=0, atol=1e-12)


def test_the_last_row_may_lie_more_than_2_to_the_31_elements_from_the_first(programs_from):
    """Of the tensors of 4 GB only the last rows are ever touched."""
    hidden, block = 768, {"THRESHOLD": 6554, "HIDDEN": 768, "ROWS": 4, "RUNS": 32}
    program = 2**31 // (4 * hidden) + 1
    start, tokens = 4 * program, 4 * program + 3

    def far(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype)

    x, residual, weight, bias, dy, dy_again = make(BF16, hidden, tokens=3)
    y, rstd = module.layer_norm_forward(x, residual, weight, bias, 1e-12, 6554, KEYS[:3], 9)
    dx, dz, dweight, dbias = module.layer_norm_backward(y, dy, dy_again, weight, bias, rstd, 6554, KEYS[:3], 9)

    programs_from(program)
    x_far, residual_far, y_far, dy_far, dy_again_far, dx_far, dz_far = (far(tokens, hidden) for _ in range(7))
    keys_far, rstd_far = far(tokens, dtype=torch.int64), far(tokens, dtype=FP32)
    for place, value in ((x_far, x), (residual_far, residual), (dy_far, dy), (dy_again_far, dy_again), (keys_far, KEYS[:3])):
        place[start:] = value
    inputs = x_far, residual_far, weight, bias, keys_far, 9, y_far, rstd_far, tokens
    launch(module.layer_norm_forward_kernel, (1,), *inputs, EPS=1e-12, device=x.device, **block)
    assert torch.equal(y_far[start:], y) and torch.equal(rstd_far[start:], rstd)
    partials = far(program + 1, 2, hidden, dtype=FP32)
    inputs = y_far, dy_far, dy_again_far, weight, bias, rstd_far, keys_far, 9, dz_far, dx_far, partials, tokens
    numbers = {"ROUNDING": 2**-9, "SMALLEST": 2**-126, "HOLD": True}
    launch(module.layer_norm_backward_kernel, (1,), *inputs, device=x.device, **numbers, **block)
    assert torch.equal(dx_far[start:], dx) and torch.equal(dz_far[start:], dz)
    assert torch.equal(partials[-1].to(BF16), torch.stack([dweight, dbias]))


def test_nothing_outside_of_the_tensors_is_read_or_written():
    tokens, hidden, guard = 5, 192, 256

    def guarded(*shape, dtype=FP32):
        storage = torch.full((math.prod(shape) + 2 * guard,), math.nan, dtype=dtype)
        return storage, storage[guard:-guard].view(shape)

    places = [guarded(*x.shape) for x in make(FP32, hidden, tokens)]
    for (_, view), x in zip(places, make(FP32, hidden, tokens), strict=True):
        view.copy_(x)
    x, residual, weight, bias, dy, dy_again = (view for _, view in places)
    outputs = [guarded(tokens, hidden) for _ in range(3)] + [guarded(tokens), guarded(2, 2, hidden)]
    y, dz, dx, rstd, partials = (view for _, view in outputs)
    tile = {"THRESHOLD": 6554, "HIDDEN": hidden, "ROWS": 4, "RUNS": 32, "device": x.device}
    launch(module.layer_norm_forward_kernel, (2,), x, residual, weight, bias, KEYS, 9, y, rstd, tokens, EPS=1e-12, **tile)
    inputs = y, dy, dy_again, weight, bias, rstd, KEYS, 9, dz, dx, partials, tokens
    launch(module.layer_norm_backward_kernel, (2,), *inputs, ROUNDING=2**-24, SMALLEST=1e-38, HOLD=True, **tile)
    for storage, view in outputs:
        assert view.isfinite().all()
        assert storage[:guard].isnan().all() and storage[-guard:].isnan().all()


def test_the_gradient_by_finite_differences():
    inputs = [x.requires_grad_() for x in make(FP64, 64, tokens=3)[:4]]

    def both(*inputs):
        y, y_again = dropout_residual_layer_norm(*inputs, 1e-12, dropout_p=0.1, dropout_keys_t=KEYS[:3], site=2)
        return y + 2 * y_again

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


def test_an_empty_batch_has_a_gradient():
    inputs = [x.requires_grad_() for x in make(FP32, 64, tokens=0)[:4]]
    y, y_again = dropout_residual_layer_norm(*inputs, 1e-12, dropout_p=0.1, dropout_keys_t=KEYS[:0])
    (y + y_again).sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


@pytest.mark.parametrize("hidden", [100, 8256])
def test_hidden_sizes_that_no_kernel_takes_are_refused(hidden):
    with pytest.raises(ValueError, match=f"hidden size {hidden} is not a multiple of 64 up to 8192"):
        dropout_residual_layer_norm(*make(FP32, hidden)[:4], 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_operators_keep_the_rules_of_torch(p):
    x, residual, weight, bias, dy, dy_again = make(FP32, 64, tokens=3)
    site = (6554, KEYS[:3], 2) if p else (0, None, 2)
    torch.library.opcheck(module.layer_norm_forward, (x, residual if p else None, weight, bias, 1e-12, *site))
    y, rstd = module.layer_norm_forward(x, residual, weight, bias, 1e-12, *site)
    torch.library.opcheck(module.layer_norm_backward, (y, dy, dy_again if p else None, weight, bias, rstd, *site))


def test_torch_compile_keeps_it_in_one_graph():
    def block(x, residual, weight, bias, keys):
        y, y_again = dropout_residual_layer_norm(x, residual, weight, bias, 1e-12, dropout_p=0.1, dropout_keys_t=keys)
        dense = dropout(y @ torch.eye(64), 0.1, keys, 3)
        return dropout_residual_layer_norm(dense, y_again, weight, bias, 1e-12)[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (5, 11):
        results = []
        for function in (block, compiled):
            leaves = [x.requires_grad_() for x in make(FP32, 64, tokens)[:4]]
            out = function(*leaves, KEYS[:tokens])
            out.square().sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for mine, expected in zip(*results, strict=True):
            assert torch.equal(mine, expected)
