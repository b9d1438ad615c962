"""Dropout + residual + LayerNorm against the formula in float64."""

import math

import pytest
import torch

from kernels import dropout_residual_layer_norm
from kernels.random import fork, keep_mask

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KEYS = fork(5, torch.arange(37))


def make(dtype=torch.float64, tokens=37, hidden=24):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(tokens, hidden), draw(tokens, hidden), draw(hidden), draw(hidden)


def naive(x, residual, weight, bias, eps, keep=None, scale=1.0):
    rows = []
    for t in range(len(x)):
        z = x[t].double()
        if keep is not None:
            z = z * keep[t] * scale
        if residual is not None:
            z = z + residual[t].double()
        mean = z.sum() / len(z)
        variance = ((z - mean) ** 2).sum() / len(z)
        rows.append((z - mean) / math.sqrt(variance + eps) * weight.double() + bias.double())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_formula(dtype, dropout_p, with_residual):
    x, residual, weight, bias = make(dtype)
    residual = residual if with_residual else None
    out, again = dropout_residual_layer_norm(
        x, residual, weight, bias, 1e-12, dropout_p=dropout_p, dropout_keys_t=KEYS, site=9
    )
    keep, scale = (keep_mask(KEYS, 9, 24, 0.1), 65536 / (65536 - 6554)) if dropout_p else (None, 1.0)
    expected = naive(x, residual, weight, bias, 1e-12, keep, scale)
    assert torch.equal(out, again) and out.dtype == dtype
    assert ((out.double() - expected).abs() / expected.abs().clamp(min=1)).max() <= TOLERANCE[dtype]


def test_weights_may_be_wider_than_the_input():
    """Under bf16 training a caller may keep LayerNorm weights in fp32."""
    x, residual, weight, bias = make(torch.bfloat16)
    out, _ = dropout_residual_layer_norm(x, residual, weight.float(), bias.float(), 1e-12)
    assert out.dtype == torch.bfloat16


def test_a_constant_row_is_its_bias():
    x, _, weight, bias = make(torch.float32)
    out, _ = dropout_residual_layer_norm(torch.full_like(x, 3.0), None, weight, bias, 1e-12)
    assert torch.equal(out, bias.expand_as(out))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_gradient_by_finite_differences(dropout_p):
    inputs = tuple(x.requires_grad_() for x in make(tokens=5, hidden=6))
    assert torch.autograd.gradcheck(
        lambda *x: dropout_residual_layer_norm(*x, 1e-12, dropout_p=dropout_p, dropout_keys_t=KEYS[:5], site=2), inputs
    )


def test_an_empty_batch_has_a_gradient():
    inputs = [x.requires_grad_() for x in make(tokens=0)]
    dropout_residual_layer_norm(*inputs, 1e-12, dropout_p=0.1, dropout_keys_t=KEYS[:0], site=2)[0].sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)
