"""GEGLU with its dropout as Triton kernels: one pass forward, one backward, and only the input is kept between them.

Both are bound by memory as long as the error function and the generator leave it time: 6 bytes an output forward and 10
backward for 16-bit types. A program walks along one row, so that the row's key is forked once; each thread takes runs of
eight neighbours, which is one 16-byte load of a 16-bit type and two words of the generator.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import launch, tile
from kernels.fused.random import drop_runs, fork
from kernels.random import drop_threshold

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_HALF_LOG2E = tl.constexpr(0.7213475204444817)
_LOG2_SQRT_2PI = tl.constexpr(1.3257480647361595)


@triton.jit
def _normal_cdf(x):
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2.

    In fp32 not by CUDA's error function, whose two branches cost 29 instructions, but as 2^P(-|x|) and its complement: P is
    the minimax fit of degree 8 to log2 Phi over [-5.5, 0], errors weighted by Phi^0.9, and goes on falling below -5.5. The
    error is under 1e-7 for every x; a GPU's fast exp2 makes it 2e-7, a thousandth of what rounding to bf16 does.
    """
    if x.dtype == tl.float64:
        return 0.5 * (1 + tl.erf(x * _SQRT_HALF))
    else:
        z = tl.abs(x)
        p = z * -2.51908568e-06 + 3.60111408e-05
        p = z * p - 0.000172247994
        p = z * p - 0.000165408157
        p = z * p + 0.00709360698
        p = z * p - 0.0525120758
        p = z * p - 0.459204644
        p = z * p - 1.1511054
        tail = tl.exp2(z * p - 1)
        return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def _load_row(x, row, x_stride, first, FEATURES: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr):
    """Gate and up-projection of a part of a row, [RUNS, 8]; their columns, and which of these exist."""
    column = first + tl.arange(0, RUNS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if FEATURES % (RUNS * 8) == 0:
        exist = tl.full((RUNS, 8), True, tl.int1)
    else:
        exist = column < FEATURES
    gate = tl.load(x + row * x_stride + column, mask=exist, other=0).to(WIDE)
    up = tl.load(x + row * x_stride + FEATURES + column, mask=exist, other=0).to(WIDE)
    return gate, up, column, exist


@triton.jit(do_not_specialize=["site"])
def geglu_forward(
    x, keys, out, x_stride, site,
    THRESHOLD: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if THRESHOLD > 0:
        seed = fork(tl.load(keys + row), site)
    for first in tl.range(0, FEATURES, RUNS * 8):
        gate, up, column, exist = _load_row(x, row, x_stride, first, FEATURES, RUNS, WIDE)
        y = gate * _normal_cdf(gate) * up
        if THRESHOLD > 0:
            y = drop_runs(y, seed, first // 8 + tl.arange(0, RUNS)[:, None], THRESHOLD)
        tl.store(out + row * FEATURES + column, y.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["site"])
def geglu_backward(
    grad, x, keys, grad_x, x_stride, site,
    THRESHOLD: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if THRESHOLD > 0:
        seed = fork(tl.load(keys + row), site)
    for first in tl.range(0, FEATURES, RUNS * 8):
        gate, up, column, exist = _load_row(x, row, x_stride, first, FEATURES, RUNS, WIDE)
        g = tl.load(grad + row * FEATURES + column, mask=exist, other=0).to(WIDE)
        if THRESHOLD > 0:
            g = drop_runs(g, seed, first // 8 + tl.arange(0, RUNS)[:, None], THRESHOLD)
        cdf = _normal_cdf(gate)
        density = tl.exp2(gate * gate * -_HALF_LOG2E - _LOG2_SQRT_2PI)
        to_gate = grad_x + row * (2 * FEATURES) + column
        tl.store(to_gate, (g * up * (cdf + gate * density)).to(grad_x.dtype.element_ty), mask=exist)
        tl.store(to_gate + FEATURES, (g * gate * cdf).to(grad_x.dtype.element_ty), mask=exist)


def _options(kernel: str, x_t2f: Tensor, threshold: int) -> dict[str, Any]:
    features = x_t2f.shape[1] // 2
    options = tile(kernel, bits=8 * x_t2f.element_size())
    return {
        **options,
        "RUNS": min(options["RUNS"], triton.next_power_of_2(triton.cdiv(features, 8))),
        "THRESHOLD": threshold,
        "FEATURES": features,
        "WIDE": tl.float64 if x_t2f.dtype == torch.float64 else tl.float32,
    }


@torch.library.custom_op("dnabert2::geglu_forward", mutates_args=())
def _forward(x_t2f: Tensor, keys_t: Tensor | None, threshold: int, site: int) -> Tensor:
    out_tf = _empty(x_t2f, keys_t, threshold, site)
    launch(
        geglu_forward,
        (len(x_t2f),),
        *(x_t2f, keys_t, out_tf, x_t2f.stride(0), site),
        device=x_t2f.device,
        **_options("geglu_forward", x_t2f, threshold),
    )
    return out_tf


@_forward.register_fake
def _empty(x_t2f: Tensor, keys_t: Tensor | None, threshold: int, site: int) -> Tensor:
    return x_t2f.new_empty(x_t2f.shape[0], x_t2f.shape[1] // 2)


@torch.library.custom_op("dnabert2::geglu_backward", mutates_args=())
def _backward(grad_tf: Tensor, x_t2f: Tensor, keys_t: Tensor | None, threshold: int, site: int) -> Tensor:
    grad_x_t2f = _empty_gradient(grad_tf, x_t2f, keys_t, threshold, site)
    launch(
        geglu_backward,
        (len(x_t2f),),
        *(grad_tf.contiguous(), x_t2f, keys_t, grad_x_t2f, x_t2f.stride(0), site),
        device=x_t2f.device,
        **_options("geglu_backward", x_t2f, threshold),
    )
    return grad_x_t2f


@_backward.register_fake
def _empty_gradient(grad_tf: Tensor, x_t2f: Tensor, keys_t: Tensor | None, threshold: int, site: int) -> Tensor:
    return x_t2f.new_empty(x_t2f.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_t2f, keys_t, ctx.threshold, ctx.site = inputs
    ctx.save_for_backward(x_t2f, keys_t)


def _gradient(ctx: Any, grad_tf: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward(grad_tf, *ctx.saved_tensors, ctx.threshold, ctx.site), None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def geglu(x_t2f: Tensor, *, dropout_p: float = 0.0, dropout_keys_t: Tensor | None = None, site: int = 0) -> Tensor:
    """As `kernels.geglu`."""
    if x_t2f.stride(1) != 1:
        x_t2f = x_t2f.contiguous()
    if dropout_p == 0.0 or dropout_keys_t is None:
        return _forward(x_t2f, None, 0, site)
    return _forward(x_t2f, dropout_keys_t.contiguous(), drop_threshold(dropout_p), site)
