"""The cross entropy kernels against the plain twin in float64, and what they do to the logits."""

import math

import pytest
import torch

from kernels import IGNORE_INDEX
from kernels.fused import cross_entropy as module
from kernels.fused.cross_entropy import masked_cross_entropy
from kernels.fused.launch import launch
from kernels.plain.cross_entropy import masked_cross_entropy as twin

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(dtype, vocabulary, rows=7):
    """Row 1 is ignored, row 2 is right."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1], labels[2] = IGNORE_INDEX, logits[2].argmax()
    return logits, labels


def run(function, logits, labels, scale=1 / 7):
    """Loss, count, right and the gradient of the scaled loss."""
    logits = logits.clone().requires_grad_()
    loss, count, right = function(logits * 1, labels)
    (gradient,) = torch.autograd.grad(loss * scale, logits)
    return loss.detach(), count, right, gradient


@pytest.mark.parametrize("vocabulary", [37, 4096, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_exact_than_the_twin(dtype, vocabulary):
    logits, labels = make(dtype, vocabulary)
    exact, plain, ours = (
        run(twin, logits.double(), labels),
        run(twin, logits, labels),
        run(masked_cross_entropy, logits, labels),
    )
    for name, theirs, mine in zip(("loss", "count", "right", "gradient"), plain, ours, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
    assert ours[1:3] == exact[1:3]
    rounding = torch.finfo(ours[0].dtype).eps
    for i, largest in ((0, float(exact[0])), (3, 1 / 7)):
        error, allowed = ((result[i].double() - exact[i]).abs().max() for result in (ours, plain))
        assert error <= 2 * allowed + 4 * rounding * largest


def test_the_gradient_is_written_over_the_logits_and_nothing_round_them_is_touched():
    values, labels = make(torch.bfloat16, 37)
    leaf, storage = values.clone().requires_grad_(), torch.full((7, 64), math.nan, dtype=torch.bfloat16)
    logits = torch.as_strided(storage, (7, 37), (64, 1), 11).copy_(leaf)
    loss, _, _ = masked_cross_entropy(logits, labels)
    assert torch.equal(logits, values)
    loss.backward()
    expected_loss, _, _, expected = run(masked_cross_entropy, values, labels, scale=1.0)
    assert torch.equal(loss, expected_loss) and torch.equal(logits, expected) and torch.equal(leaf.grad, expected)
    assert storage[:, :11].isnan().all() and storage[:, 48:].isnan().all()


def test_logits_that_are_a_leaf_keep_their_values():
    values, labels = make(torch.bfloat16, 37)
    expected = run(masked_cross_entropy, values, labels, scale=1.0)[3]
    for logits in (leaf := values.clone().requires_grad_(), leaf.view(7, 37)):
        leaf.grad = None
        masked_cross_entropy(logits, labels)[0].backward()
        assert torch.equal(leaf, values) and torch.equal(leaf.grad, expected)


def test_rows_may_lie_more_than_2_to_the_31_elements_apart():
    """Of the 4 GB only three rows are ever touched."""
    values, labels = make(torch.bfloat16, 37, rows=3)
    apart = torch.empty(2**31 + 80, dtype=torch.bfloat16).as_strided((3, 37), (2**30 + 16, 1))
    loss, _, _, largest, sums = module._forward_op(apart.copy_(values), labels, IGNORE_INDEX)
    module._backward_op(apart, labels, largest, sums, torch.tensor(1.0), IGNORE_INDEX)
    expected_loss, _, _, expected = run(masked_cross_entropy, values, labels, scale=1.0)
    assert torch.equal(loss, expected_loss) and torch.equal(apart, expected)


def test_the_sums_are_over_all_rows():
    """More than the one program of `cross_entropy_sum` takes at once."""
    generator = torch.Generator().manual_seed(0)
    rows = 10_007
    losses = torch.rand(rows, generator=generator)
    labels = torch.randint(-1, 3, (rows,), generator=generator)
    right = torch.randint(0, 2, (rows,), generator=generator, dtype=torch.int8)
    loss, count, right_count = torch.empty(()), torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    sums = losses, labels, right, loss, count, right_count, rows, -1
    launch(module.cross_entropy_sum, (1,), *sums, device=losses.device, BLOCK=4096)
    assert float(loss) == pytest.approx(float(losses.double().sum()), rel=1e-6)
    assert (int(count), int(right_count)) == (int((labels != -1).sum()), int(right.sum()))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_ignored_rows_count_for_nothing_whatever_their_logits(poison):
    logits, labels = make(torch.float32, 37)
    clean = run(masked_cross_entropy, logits, labels)
    logits[1] = poison
    for mine, expected in zip(run(masked_cross_entropy, logits, labels), clean, strict=True):
        assert torch.equal(mine, expected)
    assert not clean[3][1].any()


def test_the_first_of_equal_logits_is_the_prediction():
    logits = torch.zeros(4, 5000)
    logits[:, [7, 300, 4800]] = 2.0
    _, count, right = masked_cross_entropy(logits, torch.tensor([7, 300, 4800, 8]))
    assert (int(count), int(right)) == (4, 1)
    logits[:, 7] = 3.0
    assert int(masked_cross_entropy(logits, torch.tensor([7, 7, 300, IGNORE_INDEX]))[2]) == 2


@pytest.mark.parametrize("label", [37, -1, 2**32 + 3])
def test_a_label_outside_of_the_vocabulary_makes_the_loss_and_the_gradient_of_its_row_nan(label):
    logits, labels = make(torch.float32, 37)
    expected = run(masked_cross_entropy, logits, labels)[3]
    labels[4] = label
    loss, _, _, gradient = run(masked_cross_entropy, logits, labels)
    assert loss.isnan() and gradient[4].isnan().all()
    others = torch.arange(7) != 4
    assert torch.equal(gradient[others], expected[others])


def test_a_nan_is_not_hidden():
    logits, labels = make(torch.float32, 37)
    logits[4, 20] = math.nan
    loss, _, _, gradient = run(masked_cross_entropy, logits, labels)
    assert loss.isnan() and gradient[4].isnan().all() and gradient[:4].isfinite().all()


def test_logits_may_be_huge_or_minus_infinity():
    logits = torch.full((3, 5000), -math.inf)
    logits[0, :2] = torch.tensor([1e4, 0.0])
    logits[1, 4990:] = 1.0  # the first chunk has nothing
    logits[2, :] = -3e4
    ours = run(masked_cross_entropy, logits, torch.tensor([1, 4999, 0]))
    expected = run(twin, logits, torch.tensor([1, 4999, 0]))
    assert float(ours[0]) == pytest.approx(1e4 + math.log(10) + math.log(5000), rel=1e-6)
    assert torch.allclose(ours[3], expected[3], atol=1e-7)


@pytest.mark.parametrize("labels", [[], [IGNORE_INDEX, IGNORE_INDEX]])
def test_nothing_masked_gives_no_loss_and_a_gradient_of_zero(labels):
    loss, count, right, gradient = run(
        masked_cross_entropy, torch.randn(len(labels), 37), torch.tensor(labels, dtype=torch.int64)
    )
    assert float(loss) == 0 and int(count) == int(right) == 0
    assert gradient.shape == (len(labels), 37) and not gradient.any()


@pytest.mark.parametrize("retain_graph", [True, False])
def test_a_second_backward_pass_is_refused(retain_graph):
    logits, labels = make(torch.float32, 37)
    loss, _, _ = masked_cross_entropy(logits.requires_grad_() * 1, labels)
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match=r"second backward pass.*run the forward pass again"):
        loss.backward()


def test_a_second_derivative_is_refused():
    logits, labels = make(torch.float32, 37)
    loss, _, _ = masked_cross_entropy(logits.requires_grad_() * 1, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_the_custom_operations_are_what_they_say():
    logits, labels = make(torch.float32, 37)
    torch.library.opcheck(module._forward_op, (logits.clone().requires_grad_(), labels, IGNORE_INDEX))
    _, _, _, largest, sums = module._forward_op(logits, labels, IGNORE_INDEX)
    torch.library.opcheck(module._backward_op, (logits, labels, largest, sums, torch.tensor(2.0), IGNORE_INDEX))


def test_torch_compile_keeps_the_operation_in_one_graph():
    linear, labels = torch.nn.Linear(16, 37), make(torch.float32, 37)[1]
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))

    def step(hidden):
        loss, count, right = masked_cross_entropy(linear(hidden), labels)
        return loss / count, right

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        linear.zero_grad()
        loss, right = function(hidden)
        loss.backward()
        results.append((loss.detach(), right, linear.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
