"""The dropout kernel against its plain twin."""

import math

import pytest
import torch

from kernels.fused.dropout import _dropout_op, dropout, dropout_kernel
from kernels.fused.launch import launch
from kernels.plain.dropout import dropout as twin
from kernels.random import fork, keep_scale

KEYS = fork(5, torch.arange(11))


@pytest.mark.parametrize("width", [4, 100, 768])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_value_and_gradient_are_the_twins(dtype, width):
    x = torch.randn(11, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    results = []
    for function in (dropout, twin):
        leaf = x.clone().requires_grad_()
        y = function(leaf, 0.1, KEYS, 7)
        (y * x).sum().backward()
        results += [y.detach(), leaf.grad]
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 0}
    for ours, expected in (results[::2], results[1::2]):
        assert torch.equal(ours == 0, expected == 0)
        torch.testing.assert_close(ours, expected, **rounding)


def test_the_scale_is_not_rounded_to_the_dtype_of_the_input():
    """1 / 0.9 in bf16 is 1.109375: it would shrink everything by more than a thousandth."""
    x = torch.rand(11, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = dropout(x, 0.1, KEYS, 7)
    assert float(y.double().sum() / x[y != 0].double().sum()) == pytest.approx(keep_scale(0.1), rel=2e-4)


def test_what_lies_round_the_input_is_not_used():
    storage = torch.full((11 * 100 + 64,), math.nan)
    x = storage[32:-32].view(11, 100).fill_(1.0)
    assert dropout(x, 0.1, KEYS, 7).isfinite().all()


def test_the_last_row_may_lie_more_than_2_to_the_31_elements_from_the_first(programs_from):
    """Of the tensors of 4 GB only the last three rows are ever touched."""
    tile = {"THRESHOLD": 6554, "WIDTH": 64, "ROWS": 8, "RUNS": 8}
    program = 2**31 // (8 * 64) + 1
    x, y = (torch.empty(8 * program + 3, 64, dtype=torch.bfloat16) for _ in range(2))
    keys = torch.empty(8 * program + 3, dtype=torch.int64)
    x[-3:], keys[-3:] = 1.0, KEYS[:3]
    expected = dropout(torch.ones(3, 64, dtype=torch.bfloat16), 6554 / 65536, KEYS[:3], 7)
    programs_from(program)
    launch(dropout_kernel, (1, 1), x, keys, 7, y, len(x), device=x.device, **tile)
    assert torch.equal(y[-3:], expected)


def test_nothing_happens_without_keys_or_rows():
    x = torch.randn(11, 64)
    assert dropout(x, 0.1, None, 7) is x and dropout(x, 0.0, KEYS, 7) is x
    assert dropout(x[:0], 0.1, KEYS[:0], 7).shape == (0, 64)


def test_the_operator_keeps_the_rules_of_torch():
    torch.library.opcheck(_dropout_op, (torch.randn(11, 64, requires_grad=True), 6554, KEYS, 7))
