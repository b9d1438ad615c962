"""The GEGLU kernels against the plain twin in float64."""

import math

import pytest
import torch

from kernels.fused import geglu as module
from kernels.fused.geglu import geglu
from kernels.fused.launch import launch
from kernels.plain.geglu import geglu as twin
from kernels.random import drop_threshold, fork, keep_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SITE, KEYS = 10, fork(5, torch.arange(5))


def make(dtype, features, tokens=5):
    generator = torch.Generator().manual_seed(features)
    x = 3 * torch.randn(tokens, 2 * features, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(tokens, features, generator=generator, dtype=torch.float64).to(dtype)


def run(function, x, grad, dropout_p=0.0):
    x = x.clone().requires_grad_()
    out = function(x, dropout_p=dropout_p, dropout_keys_t=KEYS, site=SITE)
    return out.detach(), *torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize("features", [37, 3072])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_exact_than_the_twin(dtype, dropout_p, features):
    x, grad = make(dtype, features)
    exact = run(twin, x.double(), grad.double(), dropout_p)
    for true, plain, ours in zip(exact, run(twin, x, grad, dropout_p), run(geglu, x, grad, dropout_p), strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        error, allowed = ((result.double() - true).abs().max() for result in (ours, plain))
        rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert error <= 2 * allowed + 4 * rounding * true.abs().max()


@pytest.mark.parametrize("features", [37, 3072])
def test_dropout_drops_what_the_keys_say(features):
    ones = torch.ones(5, 2 * features)
    out, grad = run(geglu, ones, torch.ones(5, features), 0.3)
    keep = keep_mask(KEYS, SITE, features, 0.3)
    assert torch.equal(out != 0, keep) and torch.equal(grad != 0, keep.repeat(1, 2))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_gelu_is_exact_everywhere():
    """Not the approximation by tanh, which is off by 5e-4."""
    gate = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan])])
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    ones = torch.ones(1, len(gate))
    out, grad = run(geglu, x, ones)
    exact, exact_grad = run(twin, x.double(), ones.double())
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    error, error_of_gradient = (out - exact).abs()[0, :40001], (grad - exact_grad).abs()[0, :40001]
    assert (error <= 1.2e-7 * gate[:40001].abs()).all() and (error[:20001] <= 8e-8 * gate[:20001].abs()).all()
    assert error_of_gradient.max() <= 3e-7


@pytest.mark.parametrize("features", [37, 40])
def test_nothing_beyond_the_tensors_is_read_or_written(features):
    x, grad = make(torch.float32, features)

    def guarded(value):
        buffer = torch.full((value.numel() + 4096,), math.nan, dtype=value.dtype)
        inside = buffer[2048:-2048].view(value.shape)
        inside.copy_(value)
        return buffer, inside

    (_, x_in), (_, grad_in) = guarded(x), guarded(grad)
    (out_buffer, out), (dx_buffer, dx) = guarded(grad), guarded(x)
    options = module._options("geglu_forward", x, drop_threshold(0.1))
    launch(module.geglu_forward, (5,), x_in, KEYS, out, x.stride(0), SITE, device=x.device, **options)
    launch(module.geglu_backward, (5,), grad_in, x_in, KEYS, dx, x.stride(0), SITE, device=x.device, **options)
    expected_out, expected_dx = run(geglu, x, grad, 0.1)
    assert torch.equal(out, expected_out) and torch.equal(dx, expected_dx)
    for buffer in (out_buffer, dx_buffer):
        assert buffer[:2048].isnan().all() and buffer[-2048:].isnan().all()


def test_a_nan_is_not_hidden_by_dropout():
    x = torch.ones(5, 128)
    x[:, 70] = math.nan
    keep = keep_mask(KEYS, SITE, 64, 0.5)[:, 6]
    assert keep.any() and not keep.all()
    assert geglu(x, dropout_p=0.5, dropout_keys_t=KEYS, site=SITE)[:, 6].isnan().all()


def test_strides_do_not_matter():
    x, grad = make(torch.float32, 24)
    expected = run(geglu, x, grad)
    wide = torch.full((5, 77), math.nan)
    wide[:, 9:57] = x
    for same in (wide[:, 9:57], x.T.contiguous().T):
        leaf = same.detach().requires_grad_()
        out = geglu(leaf)
        out.backward(grad.T.contiguous().T)
        assert torch.equal(out, expected[0]) and torch.equal(leaf.grad, expected[1])


def test_rows_may_lie_more_than_2_to_the_31_elements_apart():
    """Of the 4 GB only three rows are ever touched."""
    x, grad = make(torch.bfloat16, 24, tokens=3)
    apart = torch.empty(2**31 + 80, dtype=torch.bfloat16).as_strided((3, 48), (2**30 + 16, 1)).copy_(x).requires_grad_()
    out = geglu(apart)
    assert torch.equal(out, geglu(x))
    assert torch.equal(torch.autograd.grad(out, apart, grad)[0], run(geglu, x, grad)[1])


def test_the_gradient_by_finite_differences():
    x = make(torch.float64, 3, tokens=2)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: geglu(x, dropout_p=0.3, dropout_keys_t=KEYS[:2], site=SITE), (x,))


def test_an_empty_batch_has_a_gradient():
    x = torch.randn(0, 48).requires_grad_()
    geglu(x, dropout_p=0.1, dropout_keys_t=KEYS[:0], site=SITE).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("threshold", [0, 6554])
def test_the_custom_operations_are_what_they_say(threshold):
    x, grad = make(torch.float32, 12)
    keys = KEYS if threshold else None
    torch.library.opcheck(module._forward, (x.clone().requires_grad_(), keys, threshold, SITE))
    torch.library.opcheck(module._backward, (grad, x, keys, threshold, SITE))


def test_torch_compile_keeps_the_operation_in_one_graph():
    x, grad = make(torch.float32, 24)

    def step(x, **options):
        return geglu(2 * x, **options)

    eager = run(step, x, grad, 0.1)
    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"), x, grad, 0.1)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
