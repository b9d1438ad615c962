"""Attention as Triton kernels: the operators, their gradient, and the function with the arguments of the plain one.

Sequences of at most 128 tokens, the training shape, are bound by memory: one program holds a whole sequence of one head
(`attention_short`). Others take tiles of queries against tiles of keys (`attention_forward`, `attention_backward`).
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.fused.attention_backward import attention_backward_dkdv, attention_backward_dq
from kernels.fused.attention_forward import attention_forward
from kernels.fused.attention_geometry import STATISTICS_BLOCK, STATISTICS_SPARE
from kernels.fused.attention_short import attention_short_backward, attention_short_forward
from kernels.fused.launch import fitting_tile, launch, tile
from kernels.random import drop_threshold

SHORT = 128  # tokens that one program can hold
HEAD_DIMS = (32, 64, 128)
EDGE_16_BITS = 128  # a multiple of the queries of every tile of attention_backward_dkdv


def _facts(qkv_t3hd: Tensor, threshold: int) -> dict[str, Any]:
    """What chooses a tile."""
    return {"head_dim": qkv_t3hd.shape[-1], "bits": 8 * qkv_t3hd.element_size(), "dropout": threshold > 0}


def _constants(qkv_t3hd: Tensor) -> dict[str, Any]:
    """What every kernel here is compiled for, unless the tile says otherwise."""
    _, _, heads, dim = qkv_t3hd.shape
    power = 1 << (heads.bit_length() - 1)
    return {"HEADS": heads, "POWER": power, "DIM": dim, "SCALE": math.log2(math.e) / math.sqrt(dim), "PRECISION": None}


def _short_tile(kernel: str, max_seqlen: int, facts: dict[str, Any]) -> dict[str, Any] | None:
    """None where a whole sequence is too much for one program."""
    # Seen on an H200 with Triton 3.6.0: gradients of heads of 128 were wrong (16-bit types, 12 heads, sequences of 128 and
    # fewer), those of 32 and 64 right; the interpreter finds nothing. The kernels for many tiles were right for all.
    wrong = kernel == "attention_short_backward" and facts["head_dim"] > 64
    if max_seqlen > SHORT or wrong:
        return None
    block = max(16, triton.next_power_of_2(max_seqlen))
    options = fitting_tile(kernel, block=block, **facts)
    return options and {"BLOCK": block, **options}


@torch.library.custom_op("dnabert2::attention_forward", mutates_args=())
def _forward_op(
    qkv_t3hd: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys_t: Tensor | None, site: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """The output, and for backward the logarithm (base 2) of each softmax sum, [heads, rows of statistics]."""
    out_thd, lse = _forward_fake(qkv_t3hd, cu_seqlens, max_seqlen, keys_t, site, threshold)
    tokens, _, heads, _ = qkv_t3hd.shape
    if tokens == 0:
        return out_thd, lse
    facts, constants = _facts(qkv_t3hd, threshold), _constants(qkv_t3hd)
    sequences, rows, device = cu_seqlens.numel() - 1, lse.shape[1], qkv_t3hd.device
    if short := _short_tile("attention_short_forward", max_seqlen, facts):
        launch(
            attention_short_forward,
            (sequences * heads * (short["BLOCK"] // short["BLOCK_M"]),),
            *(qkv_t3hd, cu_seqlens, out_thd, lse, rows),
            device=device,
            **{**constants, **short},
        )
        return out_thd, lse
    options = {**constants, "DROPOUT": threshold > 0, **tile("attention_forward", **facts)}
    launch(
        attention_forward,
        (tokens // options["BLOCK_M"] + sequences, heads),
        *(qkv_t3hd, cu_seqlens, out_thd, lse, keys_t, sequences, rows, site, threshold),
        device=device,
        **options,
    )
    return out_thd, lse


@_forward_op.register_fake
def _forward_fake(
    qkv_t3hd: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys_t: Tensor | None, site: int, threshold: int
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, dim = qkv_t3hd.shape
    block = STATISTICS_BLOCK.value
    rows = (tokens // block + cu_seqlens.numel() - 1) * block + STATISTICS_SPARE.value
    wide = torch.promote_types(qkv_t3hd.dtype, torch.float32)
    return qkv_t3hd.new_empty(tokens, heads, dim), qkv_t3hd.new_empty(heads, rows, dtype=wide)


@torch.library.custom_op("dnabert2::attention_backward", mutates_args=())
def _backward_op(
    grad_thd: Tensor,
    qkv_t3hd: Tensor,
    out_thd: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    keys_t: Tensor | None,
    site: int,
    threshold: int,
) -> Tensor:
    """Gradient of the packed queries, keys and values."""
    grad_qkv = torch.empty_like(qkv_t3hd)
    tokens, _, heads, _ = qkv_t3hd.shape
    if tokens == 0:
        return grad_qkv
    grad_thd = grad_thd.contiguous()
    facts, constants = _facts(qkv_t3hd, threshold), _constants(qkv_t3hd)
    sequences, rows, device = cu_seqlens.numel() - 1, lse.shape[1], qkv_t3hd.device
    if short := _short_tile("attention_short_backward", max_seqlen, facts):
        launch(
            attention_short_backward,
            (sequences * heads,),
            *(qkv_t3hd, cu_seqlens, out_thd, lse, grad_thd, grad_qkv, rows),
            device=device,
            **{**constants, **short},
        )
        return grad_qkv
    constants["DROPOUT"] = threshold > 0
    statistics = lse.new_empty(2, *lse.shape, 2)
    dkdv = {**constants, **tile("attention_backward_dkdv", **facts)}
    # What is added to the log-sum-exp is rounded with it: the fewer tokens, the less. 16-bit types don't see the difference.
    dkdv["EDGE"] = EDGE_16_BITS if facts["bits"] == 16 else dkdv["BLOCK_M"]
    options = {**constants, **tile("attention_backward_dq", **facts), "EDGE": dkdv["EDGE"]}
    launch(
        attention_backward_dq,
        (tokens // options["BLOCK_M"] + sequences, heads),
        *(qkv_t3hd, cu_seqlens, out_thd, lse, statistics, grad_thd, grad_qkv, keys_t, sequences, rows, site, threshold),
        device=device,
        **options,
    )
    launch(
        attention_backward_dkdv,
        (tokens // dkdv["BLOCK_N"] + sequences, heads),
        *(qkv_t3hd, cu_seqlens, statistics, grad_thd, grad_qkv, keys_t, sequences, rows, site, threshold),
        device=device,
        **dkdv,
    )
    return grad_qkv


@_backward_op.register_fake
def _backward_fake(grad_thd: Tensor, qkv_t3hd: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv_t3hd)


def _setup_context(ctx, inputs, output) -> None:
    qkv_t3hd, cu_seqlens, ctx.max_seqlen, keys_t, ctx.site, ctx.threshold = inputs
    ctx.save_for_backward(qkv_t3hd, *output, cu_seqlens, keys_t)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_thd, _):
    if grad_thd is None:
        return (None,) * 6
    qkv_t3hd, out_thd, lse, cu_seqlens, keys_t = ctx.saved_tensors
    grad_qkv = _backward_op(grad_thd, qkv_t3hd, out_thd, lse, cu_seqlens, ctx.max_seqlen, keys_t, ctx.site, ctx.threshold)
    return grad_qkv, None, None, None, None, None


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


def attention(
    qkv_t3hd: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    dropout_keys_t: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """As `kernels.attention`. ValueError for heads of other than 32, 64 or 128 dimensions."""
    if qkv_t3hd.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"heads of {qkv_t3hd.shape[-1]} dimensions: Triton's attention has kernels for 32, 64 and 128")
    threshold = 0 if dropout_keys_t is None else drop_threshold(dropout_p)
    keys_t = dropout_keys_t.contiguous() if dropout_keys_t is not None and threshold else None
    out_thd, _ = _forward_op(qkv_t3hd.contiguous(), cu_seqlens.contiguous(), max_seqlen, keys_t, site, threshold)
    return out_thd
