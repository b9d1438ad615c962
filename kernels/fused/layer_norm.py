"""Dropout, residual sum and LayerNorm in one pass forward and one pass backward.

These steps are bound by memory. The forward pass reads x and the residual and writes the output y and one number a row; the
backward pass reads y and the incoming gradients only: it rebuilds the normalized sum from y (as `memory_efficient` of
NVIDIA's apex does) and the dropout mask from the keys. That is 6 bytes an element of a 16-bit type forward, and 6 to 10
backward, less than half of what the steps move one by one; the instructions have to fit into that time. Hence the layout: up
to 768 columns a warp holds a row, each of its threads runs of eight neighbours, which are one 16-byte load and two words of
the generator. A tile is [rows * runs, 8]. With rows and runs as two axes Triton 3.6 would spread a row over all warps, and
every sum of a row would wait for all of them.
"""

# mypy: disable-error-code="assignment, var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from kernels import interpreter
from kernels.fused.launch import launch, multiprocessors, tile
from kernels.fused.random import drop_runs, fork
from kernels.random import drop_threshold

WIDTHS = 768, 3072, 6144, 8192  # widest row of each kind of tile: it has to fit into the registers of the row's threads


@triton.jit
def _rows_and_runs(block, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Row and run of eight columns of each line of a tile, [ROWS * RUNS, 1]."""
    line = tl.arange(0, ROWS * RUNS)[:, None]
    return block * ROWS + line // RUNS, line % RUNS


@triton.jit
def _places(rows, runs, tokens, HIDDEN: tl.constexpr):
    """Offsets of a tile's elements in a [tokens, HIDDEN] tensor, and which of them exist."""
    columns = runs * 8 + tl.arange(0, 8)[None, :]
    return rows.to(tl.int64) * HIDDEN + columns, (rows < tokens) & (columns < HIDDEN)


@triton.jit
def _of_columns(vector, runs, wide, HIDDEN: tl.constexpr):
    """The elements of a [HIDDEN] vector that belong to a tile's elements; 0 beyond its end."""
    columns = runs * 8 + tl.arange(0, 8)[None, :]
    return tl.load(vector + columns, mask=columns < HIDDEN, other=0).to(wide)


@triton.jit
def _inverse(weight, bias, runs, wide, ROUNDING: tl.constexpr, SMALLEST: tl.constexpr, HIDDEN: tl.constexpr):
    """The weights, and inverse and shift such that xhat = y * inverse - shift; 0 where the rounding of y hides xhat."""
    w = _of_columns(weight, runs, wide, HIDDEN)
    b = _of_columns(bias, runs, wide, HIDDEN)
    visible = tl.abs(w) >= tl.maximum(tl.abs(b) * ROUNDING, SMALLEST)
    inverse = tl.where(visible, 1 / tl.where(visible, w, 1), 0)
    return w, inverse, b * inverse


@triton.jit
def _row_mean(x, HIDDEN: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Mean over the columns, for each line of the tile, [ROWS * RUNS, 1]."""
    means = tl.sum(tl.reshape(tl.sum(x, 1), (ROWS, RUNS)), 1, keep_dims=True) / HIDDEN
    return tl.reshape(tl.broadcast_to(means, (ROWS, RUNS)), (ROWS * RUNS, 1))


@triton.jit(do_not_specialize=["site", "tokens"])
def layer_norm_forward_kernel(
    x, residual, weight, bias, keys, site, y, rstd, tokens,
    EPS: tl.constexpr, THRESHOLD: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (HIDDEN + RUNS * 8 - 1) // (RUNS * 8)
    wide = rstd.dtype.element_ty
    rows, runs = _rows_and_runs(tl.program_id(0), ROWS, RUNS)
    if THRESHOLD > 0:
        seeds = fork(tl.load(keys + rows, mask=rows < tokens, other=0), site)
    z = ()
    total = tl.zeros((ROWS * RUNS, 8), wide)
    for chunk in tl.static_range(chunks):
        offsets, exist = _places(rows, runs + chunk * RUNS, tokens, HIDDEN)
        part = tl.load(x + offsets, mask=exist, other=0).to(wide)
        if THRESHOLD > 0:
            part = drop_runs(part, seeds, runs + chunk * RUNS, THRESHOLD)
        if residual is not None:
            part += tl.load(residual + offsets, mask=exist, other=0).to(wide)
        z = z + (part,)
        total += part
    mean = _row_mean(total, HIDDEN, ROWS, RUNS)
    centred = ()
    total = tl.zeros((ROWS * RUNS, 8), wide)
    squares = tl.zeros((ROWS * RUNS, 8), wide)
    for chunk in tl.static_range(chunks):
        part = z[chunk] - mean
        if (chunk + 1) * RUNS * 8 > HIDDEN:
            offsets, exist = _places(rows, runs + chunk * RUNS, tokens, HIDDEN)
            part = tl.where(exist, part, 0)
        centred = centred + (part,)
        total += part
        squares += part * part
    # The mean was rounded. In a constant row that rounding would be all there is, and be blown up by 1 / sqrt(eps).
    rest = _row_mean(total, HIDDEN, ROWS, RUNS)
    scale = 1 / tl.sqrt(tl.maximum(_row_mean(squares, HIDDEN, ROWS, RUNS) - rest * rest, 0) + EPS)
    tl.store(rstd + rows, scale, mask=rows < tokens)
    for chunk in tl.static_range(chunks):
        offsets, exist = _places(rows, runs + chunk * RUNS, tokens, HIDDEN)
        out = (centred[chunk] * scale - rest * scale) * _of_columns(weight, runs + chunk * RUNS, wide, HIDDEN)
        out += _of_columns(bias, runs + chunk * RUNS, wide, HIDDEN)
        tl.store(y + offsets, out.to(y.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["site", "tokens"])
def layer_norm_backward_kernel(
    y, dy, dy_again, weight, bias, rstd, keys, site, dz, dx, partials, tokens,
    ROUNDING: tl.constexpr, SMALLEST: tl.constexpr, THRESHOLD: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (HIDDEN + RUNS * 8 - 1) // (RUNS * 8)
    wide = rstd.dtype.element_ty
    held = ()
    dweight = ()
    dbias = ()
    _, runs = _rows_and_runs(0, ROWS, RUNS)
    for chunk in tl.static_range(chunks):
        if HOLD:
            held = held + (_inverse(weight, bias, runs + chunk * RUNS, wide, ROUNDING, SMALLEST, HIDDEN),)
        dweight = dweight + (tl.zeros((ROWS * RUNS, 8), wide),)
        dbias = dbias + (tl.zeros((ROWS * RUNS, 8), wide),)
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        rows, runs = _rows_and_runs(block, ROWS, RUNS)
        if THRESHOLD > 0:
            seeds = fork(tl.load(keys + rows, mask=rows < tokens, other=0), site)
        scale = tl.load(rstd + rows, mask=rows < tokens, other=0)
        xhats = ()
        gradients = ()
        dweight_before, dbias_before = dweight, dbias
        dweight = ()
        dbias = ()
        along = tl.zeros((ROWS * RUNS, 8), wide)
        total = tl.zeros((ROWS * RUNS, 8), wide)
        for chunk in tl.static_range(chunks):
            offsets, exist = _places(rows, runs + chunk * RUNS, tokens, HIDDEN)
            if HOLD:
                w, inverse, shift = held[chunk]
            else:  # wide rows leave no registers for them
                w, inverse, shift = _inverse(weight, bias, runs + chunk * RUNS, wide, ROUNDING, SMALLEST, HIDDEN)
            xhat = tl.load(y + offsets, mask=exist, other=0).to(wide) * inverse - shift
            g = tl.load(dy + offsets, mask=exist, other=0).to(wide)
            if dy_again is not None:
                g += tl.load(dy_again + offsets, mask=exist, other=0).to(wide)
            dweight = dweight + (dweight_before[chunk] + g * xhat,)
            dbias = dbias + (dbias_before[chunk] + g,)
            g *= w
            xhats = xhats + (xhat,)
            gradients = gradients + (g,)
            along += g * xhat
            total += g
        along = _row_mean(along, HIDDEN, ROWS, RUNS) * scale
        total = _row_mean(total, HIDDEN, ROWS, RUNS) * scale
        for chunk in tl.static_range(chunks):
            offsets, exist = _places(rows, runs + chunk * RUNS, tokens, HIDDEN)
            out = gradients[chunk] * scale - total - xhats[chunk] * along
            tl.store(dz + offsets, out.to(dz.dtype.element_ty), mask=exist)
            if THRESHOLD > 0:
                out = drop_runs(out, seeds, runs + chunk * RUNS, THRESHOLD)
                tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=exist)
    partials += tl.program_id(0) * 2 * HIDDEN
    columns = tl.arange(0, RUNS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for chunk in tl.static_range(chunks):
        exist = columns + chunk * RUNS * 8 < HIDDEN
        dweights = tl.sum(tl.reshape(dweight[chunk], (ROWS, RUNS, 8)), 0)
        dbiases = tl.sum(tl.reshape(dbias[chunk], (ROWS, RUNS, 8)), 0)
        tl.store(partials + columns + chunk * RUNS * 8, dweights, mask=exist)
        tl.store(partials + HIDDEN + columns + chunk * RUNS * 8, dbiases, mask=exist)


@triton.jit
def layer_norm_sum_kernel(
    partials, dweight, dbias, programs, HIDDEN: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sum of the programs' partial sums: of dweight by the first row of the grid, of dbias by the second."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    which = tl.program_id(1)
    total = tl.zeros((PROGRAMS, COLUMNS), partials.dtype.element_ty)
    for first in tl.range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)[:, None]
        offsets = (program * 2 + which) * HIDDEN + columns
        total += tl.load(partials + offsets, mask=(program < programs) & (columns < HIDDEN), other=0)
    total = tl.sum(total, 0, keep_dims=True)
    if which == 0:
        tl.store(dweight + columns, total.to(dweight.dtype.element_ty), mask=columns < HIDDEN)
    else:
        tl.store(dbias + columns, total.to(dbias.dtype.element_ty), mask=columns < HIDDEN)


def _multiprocessors() -> int:
    return 2 if interpreter.active() else multiprocessors(driver.active.get_current_device())


def _tile(kernel: str, x_td: Tensor, threshold: int) -> dict[str, Any]:
    hidden = x_td.shape[1]
    if hidden % 64 or hidden > WIDTHS[-1]:
        raise ValueError(
            f"hidden size {hidden} is not a multiple of 64 up to {WIDTHS[-1]}, which Triton's LayerNorm needs; use torch's"
        )
    width = next(width for width in WIDTHS if hidden <= width)
    return {
        **tile(kernel, width=width, bits=8 * x_td.element_size()),
        "HIDDEN": hidden,
        "THRESHOLD": threshold,
    }


@torch.library.custom_op("dnabert2::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x_td: Tensor,
    residual_td: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    eps: float,
    threshold: int,
    keys_t: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(Dropout(x) + residual), and 1 / standard deviation of each row, fp32 (fp64 for fp64 x)."""
    y_td, rstd_t = _forward_fake(x_td, residual_td, weight_d, bias_d, eps, threshold, keys_t, site)
    options = _tile("layer_norm_forward", x_td, threshold)
    launch(
        layer_norm_forward_kernel,
        (triton.cdiv(len(x_td), options["ROWS"]),),
        *(x_td, residual_td, weight_d, bias_d, keys_t, site, y_td, rstd_t, len(x_td)),
        device=x_td.device,
        EPS=eps,
        **options,
    )
    return y_td, rstd_t


@layer_norm_forward.register_fake
def _forward_fake(
    x_td: Tensor,
    residual_td: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    eps: float,
    threshold: int,
    keys_t: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_td.dtype, torch.float32)
    return torch.empty_like(x_td), x_td.new_empty(len(x_td), dtype=wide)


@torch.library.custom_op("dnabert2::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    y_td: Tensor,
    dy_td: Tensor,
    dy_again_td: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    rstd_t: Tensor,
    threshold: int,
    keys_t: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty without dropout: it is the next one), of the residual, of weight and bias."""
    fake = _backward_fake(y_td, dy_td, dy_again_td, weight_d, bias_d, rstd_t, threshold, keys_t, site)
    dx_td, dz_td, dweight_d, dbias_d = fake
    if len(y_td) == 0:
        return dx_td, dz_td, dweight_d.zero_(), dbias_d.zero_()
    options = _tile("layer_norm_backward", y_td, threshold)
    programs = min(triton.cdiv(len(y_td), options["ROWS"]), options.pop("programs") * _multiprocessors())
    partials = rstd_t.new_empty(programs, 2, y_td.shape[1])
    rounding = torch.finfo(y_td.dtype)
    launch(
        layer_norm_backward_kernel,
        (programs,),
        *(y_td, dy_td, dy_again_td, weight_d, bias_d, rstd_t, keys_t, site, dz_td, dx_td, partials, len(y_td)),
        device=y_td.device,
        ROUNDING=rounding.eps / 2,
        SMALLEST=rounding.tiny,
        **options,
    )
    options = tile("layer_norm_sum")
    launch(
        layer_norm_sum_kernel,
        (triton.cdiv(y_td.shape[1], options["COLUMNS"]), 2),
        *(partials, dweight_d, dbias_d, programs),
        device=y_td.device,
        HIDDEN=y_td.shape[1],
        **options,
    )
    return dx_td, dz_td, dweight_d, dbias_d


@layer_norm_backward.register_fake
def _backward_fake(
    y_td: Tensor,
    dy_td: Tensor,
    dy_again_td: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    rstd_t: Tensor,
    threshold: int,
    keys_t: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx_td = torch.empty_like(y_td) if threshold > 0 else y_td.new_empty(0)
    return dx_td, torch.empty_like(y_td), torch.empty_like(weight_d), torch.empty_like(bias_d)


class _DropoutResidualLayerNorm(torch.autograd.Function):
    """Ties the two operators together. They can't do it themselves: outputs of an operator may not share memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x_td: Tensor,
        residual_td: Tensor | None,
        weight_d: Tensor,
        bias_d: Tensor,
        eps: float,
        threshold: int,
        keys_t: Tensor | None,
        site: int,
    ) -> tuple[Tensor, Tensor]:
        y_td, rstd_t = layer_norm_forward(x_td, residual_td, weight_d, bias_d, eps, threshold, keys_t, site)
        ctx.save_for_backward(y_td, weight_d, bias_d, rstd_t, keys_t)
        ctx.threshold, ctx.site, ctx.has_residual = threshold, site, residual_td is not None
        ctx.set_materialize_grads(False)
        return y_td, y_td.view_as(y_td)

    @staticmethod
    def backward(ctx: Any, dy_td: Tensor | None, dy_again_td: Tensor | None) -> tuple[Tensor | None, ...]:
        y_td, weight_d, bias_d, rstd_t, keys_t = ctx.saved_tensors
        if dy_td is None:
            dy_td, dy_again_td = dy_again_td, None
        if dy_td is None:
            return (None,) * 8
        dy_again_td = None if dy_again_td is None else dy_again_td.contiguous()
        dx_td, dz_td, dweight_d, dbias_d = layer_norm_backward(
            y_td, dy_td.contiguous(), dy_again_td, weight_d, bias_d, rstd_t, ctx.threshold, keys_t, ctx.site
        )
        dx_td = dx_td if ctx.threshold else dz_td
        return dx_td, dz_td if ctx.has_residual else None, dweight_d, dbias_d, None, None, None, None


def dropout_residual_layer_norm(
    x_td: Tensor,
    residual_td: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    dropout_keys_t: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `kernels.dropout_residual_layer_norm`. ValueError for a hidden size that isn't a multiple of 64 up to 8192.

    The backward pass rebuilds xhat = (y - bias) / weight from the rounded y, so it is off by the rounding error of y over
    the weight. Columns in which that may exceed 1, the standard deviation of xhat (|weight| < |bias| times half the epsilon
    of the dtype, 2^-8 in bf16; or below the normal numbers), count as xhat = 0: their weight gets no gradient, and what they
    add to the gradient of x through the row's covariance is left out. In particular a weight that is 0 stays 0.
    """
    threshold = 0 if dropout_keys_t is None else drop_threshold(dropout_p)
    return _DropoutResidualLayerNorm.apply(
        x_td.contiguous(),
        None if residual_td is None else residual_td.contiguous(),
        weight_d.contiguous(),
        bias_d.contiguous(),
        eps,
        threshold,
        dropout_keys_t.contiguous() if dropout_keys_t is not None and threshold else None,
        site,
    )
