"""Masked cross entropy as Triton kernels: one pass over the logits forward, one backward that leaves the gradient in them.

The logits are the largest tensor of a step, so nothing of their size is made beside them. Forward keeps the largest logit
and the sum of exponentials of each row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, over
chunks of the vocabulary); backward computes (softmax - onehot) * gradient from the two and writes it over the logits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import launch, tile
from kernels.plain.cross_entropy import IGNORE_INDEX

_RECHECKED = tl.constexpr(1024)  # columns at a time
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_forward(
    logits, labels, losses, largest, sums, right, row_stride, ignore_index, V: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program: its loss, its largest logit, the sum of exponentials relative to that, whether it is right."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(largest + row, 0.0)
        tl.store(sums + row, 1.0)
        tl.store(right + row, 0)
        return
    row_start = logits + row.to(tl.int64) * row_stride
    wide = losses.dtype.element_ty
    inside = (label >= 0) & (label < V)
    target = tl.load(row_start + label, mask=inside, other=float("nan")).to(wide)
    top = tl.full([], float("-inf"), wide)
    total = tl.full([], 0.0, wide)
    for first in tl.range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        if V % BLOCK == 0:
            x = tl.load(row_start + column).to(wide)
        else:
            x = tl.load(row_start + column, mask=column < V, other=float("-inf")).to(wide)
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a chunk may hold nothing but -inf
        total = total * tl.exp2((top - shift) * _LOG2E) + tl.sum(tl.exp2((x - shift) * _LOG2E), 0)
        top = new_top
    # `target` is NaN where the label is outside of the vocabulary: so is the loss, and through `largest` the gradient.
    tl.store(losses + row, tl.log(total) - (target - top))
    tl.store(largest + row, tl.where(inside, top, target))
    tl.store(sums + row, total)
    right_here = target == top
    if right_here:  # unless one before it is as large; these logits are still in a cache
        for first in tl.range(0, label.to(tl.int32), _RECHECKED):
            column = first + tl.arange(0, _RECHECKED)
            x = tl.load(row_start + column, mask=column < label, other=float("-inf"))
            right_here &= tl.max(x.to(wide), 0) < top
    tl.store(right + row, right_here.to(tl.int8))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_sum(losses, labels, right, loss, count, right_count, rows, ignore_index, BLOCK: tl.constexpr):
    """The sums over the rows, by one program: the same order of additions every time, and one launch for all three."""
    loss_sum = tl.zeros([BLOCK], losses.dtype.element_ty)
    counted = tl.zeros([BLOCK], tl.int32)
    hits = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        loss_sum += tl.load(losses + row, mask=row < rows, other=0.0)
        counted += (tl.load(labels + row, mask=row < rows, other=ignore_index) != ignore_index).to(tl.int32)
        hits += tl.load(right + row, mask=row < rows, other=0).to(tl.int32)
    tl.store(loss, tl.sum(loss_sum, 0))
    tl.store(count, tl.sum(counted, 0).to(tl.int64))
    tl.store(right_count, tl.sum(hits, 0).to(tl.int64))


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward(
    logits, labels, largest, sums, grad_loss, row_stride, ignore_index, V: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program. Rows that don't count get zeros whatever they hold."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    row_start = logits + row.to(tl.int64) * row_stride
    if label == ignore_index:
        for first in tl.range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            tl.store(row_start + column, tl.zeros([BLOCK], logits.dtype.element_ty), mask=column < V)
        return
    top = tl.load(largest + row)
    grad = tl.load(grad_loss)
    scale = grad / tl.load(sums + row)
    for first in tl.range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        if V % BLOCK == 0:
            x = tl.load(row_start + column).to(top.dtype)
        else:
            x = tl.load(row_start + column, mask=column < V, other=float("-inf")).to(top.dtype)
        gradient = tl.exp2((x - top) * _LOG2E) * scale - tl.where(column == label.to(tl.int32), grad, 0.0)
        if V % BLOCK == 0:
            tl.store(row_start + column, gradient.to(logits.dtype.element_ty))
        else:
            tl.store(row_start + column, gradient.to(logits.dtype.element_ty), mask=column < V)


def _tile(kernel: str, logits_mv: Tensor) -> dict[str, int]:
    options = tile(kernel, bits=8 * logits_mv.element_size())
    return {**options, "BLOCK": min(options["BLOCK"], triton.next_power_of_2(logits_mv.shape[1])), "V": logits_mv.shape[1]}


@torch.library.custom_op("dnabert2::cross_entropy_forward", mutates_args=())
def _forward_op(logits_mv: Tensor, labels_m: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses, count, right; the largest logit and the sum of exponentials of each row, for backward."""
    loss, count, right_count, largest_m, sums_m = _forward_fake(logits_mv, labels_m, ignore_index)
    rows, device = len(labels_m), labels_m.device
    losses_m, right_m = torch.empty_like(sums_m), torch.empty_like(sums_m, dtype=torch.int8)
    launch(
        cross_entropy_forward,
        (rows,),
        *(logits_mv, labels_m, losses_m, largest_m, sums_m, right_m, logits_mv.stride(0), ignore_index),
        device=device,
        **_tile("cross_entropy_forward", logits_mv),
    )
    launch(
        cross_entropy_sum,
        (1,),
        *(losses_m, labels_m, right_m, loss, count, right_count, rows, ignore_index),
        device=device,
        **tile("cross_entropy_sum"),
    )
    return loss, count, right_count, largest_m, sums_m


@_forward_op.register_fake
def _forward_fake(logits_mv: Tensor, labels_m: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits_mv.dtype, torch.float32)
    loss, largest_m, sums_m = (logits_mv.new_empty(shape, dtype=wide) for shape in [(), labels_m.shape, labels_m.shape])
    return loss, labels_m.new_empty(()), labels_m.new_empty(()), largest_m, sums_m


@torch.library.custom_op("dnabert2::cross_entropy_backward", mutates_args=("logits_mv",))
def _backward_op(
    logits_mv: Tensor, labels_m: Tensor, largest_m: Tensor, sums_m: Tensor, grad_loss: Tensor, ignore_index: int
) -> None:
    """Writes the gradient over the logits."""
    launch(
        cross_entropy_backward,
        (len(labels_m),),
        *(logits_mv, labels_m, largest_m, sums_m, grad_loss, logits_mv.stride(0), ignore_index),
        device=logits_mv.device,
        **_tile("cross_entropy_backward", logits_mv),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_mv, labels_m, ctx.ignore_index = inputs
    *_, largest_m, sums_m = output
    ctx.save_for_backward(logits_mv, labels_m, largest_m, sums_m)
    ctx.mark_non_differentiable(largest_m, sums_m)
    ctx.set_materialize_grads(False)
    ctx.spent = False


def _gradient(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor, None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("masked_cross_entropy has no second derivative: its backward pass ran with create_graph=True")
    if ctx.spent:
        raise RuntimeError(
            "a second backward pass through masked_cross_entropy: the first wrote the gradient over the logits, so "
            "retain_graph is of no use here; run the forward pass again"
        )
    ctx.spent = True
    logits_mv, labels_m, largest_m, sums_m = ctx.saved_tensors
    _backward_op(logits_mv, labels_m, largest_m, sums_m, grad_loss, ctx.ignore_index)
    return logits_mv, None, None


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


def masked_cross_entropy(
    logits_mv: Tensor, labels_m: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.masked_cross_entropy`.

    A label outside of the vocabulary makes the loss NaN, and the gradient of its row: a bad step. Nothing outside is read.

    Raises RuntimeError in a second backward pass, and in one with create_graph=True. Under torch.compile the gradient is
    written to a copy of the logits where they are not the graph's input.
    """
    if logits_mv.stride(1) != 1 or logits_mv.stride(0) < logits_mv.shape[1]:
        logits_mv = logits_mv.contiguous()
    elif logits_mv.requires_grad and (logits_mv if logits_mv._base is None else logits_mv._base).is_leaf:
        logits_mv = logits_mv.clone()  # a leaf's values are the caller's: no gradient is written over them
    loss, count, right, _, _ = _forward_op(logits_mv, labels_m.contiguous(), ignore_index)
    return loss, count, right
