"""GEGLU against the formula in float64, with the exact gelu."""

import math

import pytest
import torch

from kernels import geglu
from kernels.random import fork, keep_mask

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KEYS = fork(5, torch.arange(19))


def make(dtype=torch.float64, tokens=19, features=10):
    x = torch.randn(tokens, 2 * features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * x).to(dtype)


def naive(x):
    features = x.shape[1] // 2
    gate, up = x[:, :features].double(), x[:, features:].double()
    return gate.clone().apply_(lambda g: g * 0.5 * (1 + math.erf(g / math.sqrt(2)))) * up


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_formula(dtype, dropout_p):
    x = make(dtype)
    out = geglu(x, dropout_p=dropout_p, dropout_keys_t=KEYS, site=10)
    expected = naive(x)
    if dropout_p:
        expected = expected * keep_mask(KEYS, 10, 10, dropout_p) * (65536 / (65536 - 6554))
    assert out.dtype == dtype and out.shape == (19, 10)
    assert ((out.double() - expected).abs() / expected.abs().clamp(min=1)).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_gradient_by_finite_differences(dropout_p):
    x = make(tokens=5, features=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: geglu(x, dropout_p=dropout_p, dropout_keys_t=KEYS[:5], site=10), (x,))


def test_an_empty_batch_has_a_gradient():
    x = make(tokens=0).requires_grad_()
    geglu(x, dropout_p=0.1, dropout_keys_t=KEYS[:0], site=10).sum().backward()
    assert x.grad.shape == x.shape
