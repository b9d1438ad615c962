"""Masked cross entropy against the formula in float64."""

import math

import pytest
import torch

from kernels import IGNORE_INDEX, masked_cross_entropy

# Relative to the sum: logits are taken as they are, so the dtype of the input costs nothing but fp32 arithmetic.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def make(dtype=torch.float64, rows=23, vocabulary=40):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return logits, labels


def naive(logits, labels):
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            total += math.log(math.fsum(math.exp(x) for x in row)) - row[label]
    return total


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sum_and_count(dtype):
    logits, labels = make(dtype)
    loss, count, _ = masked_cross_entropy(logits, labels)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == ()
    assert count.dtype == torch.int64 and int(count) == 18
    assert float(loss) == pytest.approx(naive(logits, labels), rel=TOLERANCE[dtype])


def test_right_are_the_counted_rows_whose_label_has_the_first_of_the_largest_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0], [3.0, 1.0, 3.0], [0.0, 5.0, 1.0], [0.0, 1.0, 2.0]])
    _, _, right = masked_cross_entropy(logits, torch.tensor([1, 0, 2, IGNORE_INDEX, 0]))
    assert right.dtype == torch.int64 and right.shape == () and int(right) == 2


def test_a_row_is_not_right_for_an_ignore_index_that_is_a_token():
    _, count, right = masked_cross_entropy(torch.eye(3), torch.tensor([0, 1, 2]), ignore_index=1)
    assert int(count) == int(right) == 2


def test_large_logits_do_not_overflow():
    loss, _, _ = masked_cross_entropy(torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([0, 0]))
    assert float(loss) == 1e4


def test_the_gradient_by_finite_differences():
    logits, labels = make(rows=6, vocabulary=5)
    assert torch.autograd.gradcheck(lambda x: masked_cross_entropy(x, labels)[0], (logits.requires_grad_(),))


@pytest.mark.parametrize("labels", [[], [IGNORE_INDEX, IGNORE_INDEX]])
def test_nothing_masked_gives_no_loss_and_a_gradient_of_zero(labels):
    logits = torch.randn(len(labels), 7, requires_grad=True)
    loss, count, right = masked_cross_entropy(logits, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and int(count) == int(right) == 0
    assert logits.grad.shape == logits.shape and not logits.grad.any()
