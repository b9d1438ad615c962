"""Dropout by key as a Triton kernel. Forward and backward are the same operation: the mask is drawn again from the keys."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import launch, tile
from kernels.fused.random import drop_runs, fork
from kernels.random import drop_threshold


@triton.jit(do_not_specialize=["site", "tokens"])
def dropout_kernel(
    x, keys, site, y, tokens, THRESHOLD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr
):
    wide = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    line = tl.arange(0, ROWS * RUNS)[:, None]
    rows = tl.program_id(0) * ROWS + line // RUNS
    runs = tl.program_id(1) * RUNS + line % RUNS
    columns = runs * 8 + tl.arange(0, 8)[None, :]
    offsets = rows.to(tl.int64) * WIDTH + columns
    exist = (rows < tokens) & (columns < WIDTH)
    seeds = fork(tl.load(keys + rows, mask=rows < tokens, other=0), site)
    out = drop_runs(tl.load(x + offsets, mask=exist, other=0).to(wide), seeds, runs, THRESHOLD)
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=exist)


@torch.library.custom_op("dnabert2::dropout", mutates_args=())
def _dropout_op(x_td: Tensor, threshold: int, keys_t: Tensor, site: int) -> Tensor:
    y_td = torch.empty_like(x_td)
    options = tile("dropout", bits=8 * x_td.element_size())
    launch(
        dropout_kernel,
        (triton.cdiv(len(x_td), options["ROWS"]), triton.cdiv(x_td.shape[1], 8 * options["RUNS"])),
        *(x_td, keys_t, site, y_td, len(x_td)),
        device=x_td.device,
        THRESHOLD=threshold,
        WIDTH=x_td.shape[1],
        **options,
    )
    return y_td


@_dropout_op.register_fake
def _dropout_fake(x_td: Tensor, threshold: int, keys_t: Tensor, site: int) -> Tensor:
    return torch.empty_like(x_td)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.threshold, keys_t, ctx.site = inputs
    ctx.save_for_backward(keys_t)


def _backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor, None, None, None]:
    return _dropout_op(dy_td.contiguous(), ctx.threshold, *ctx.saved_tensors, ctx.site), None, None, None


_dropout_op.register_autograd(_backward, setup_context=_setup_context)


def dropout(x_td: Tensor, p: float, keys_t: Tensor | None, site: int) -> Tensor:
    """As `kernels.dropout`."""
    if p == 0.0 or keys_t is None:
        return x_td
    return _dropout_op(x_td.contiguous(), drop_threshold(p), keys_t.contiguous(), site)
