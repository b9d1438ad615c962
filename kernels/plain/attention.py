"""Bidirectional attention with ALiBi over sequences of any lengths laid end to end (no padding in or out)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.random import keep_mask, keep_scale

MAX_SEQUENCE = 10_240  # tokens; also the stride of keys in the dropout counter, so that masks don't depend on the batch


def alibi_slopes(heads: int) -> list[float]:
    """Slope of each head: a geometric sequence for a power of two, else padded with every second slope of the next one.

    Press, Smith and Lewis, "Train short, test long", ICLR 2022 (their `get_slopes`); for 12 heads the list is not sorted.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power < heads:
        slopes += alibi_slopes(2 * power)[0::2][: heads - power]
    return slopes


def attention(
    qkv_t3hd: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    dropout_keys_t: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """As `kernels.attention`. Ragged sequences are padded inside; scores are a tensor in memory."""
    tokens, _, heads, dim = qkv_t3hd.shape
    if tokens == 0:  # an empty micro batch still has to reach every parameter in the backward pass
        return qkv_t3hd[:, 0]
    sequences = cu_seqlens.numel() - 1
    uniform = tokens == sequences * max_seqlen
    device = qkv_t3hd.device
    position = torch.arange(max_seqlen, device=device)
    wide = torch.promote_types(qkv_t3hd.dtype, torch.float32)
    slopes = torch.tensor(alibi_slopes(heads), device=device, dtype=wide)
    bias_hss = -slopes[:, None, None] * (position[:, None] - position).abs()
    if uniform:
        padded, slot, bias = qkv_t3hd, None, bias_hss[None]
    else:
        lengths = cu_seqlens.diff().long()
        slot = torch.arange(tokens, device=device) + torch.repeat_interleave(
            torch.arange(sequences, device=device) * max_seqlen - cu_seqlens[:-1], lengths, output_size=tokens
        )
        padded = qkv_t3hd.new_zeros(sequences * max_seqlen, 3, heads, dim).index_copy(0, slot, qkv_t3hd)
        bias = bias_hss[None].masked_fill((position >= lengths[:, None])[:, None, None, :], -math.inf)
    # Widened before it is cut up: for the copies' strides Inductor would take those of the first sequence length it saw.
    # Cut along the last axis, whose gradients come together again in one pass over contiguous rows.
    parts = padded.to(wide).reshape(sequences, max_seqlen, 3 * heads * dim).split(heads * dim, dim=-1)
    q, k, v = (part.view(sequences, max_seqlen, heads, dim).transpose(1, 2) for part in parts)
    with torch.autocast(device.type, enabled=False):  # it would round q, k, v and the bias to its own type
        if dropout_p == 0.0 or dropout_keys_t is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            weights = ((q @ k.transpose(-1, -2)) / math.sqrt(dim) + bias).softmax(-1)
            masks = [keep_mask(dropout_keys_t, site, max_seqlen, dropout_p, h * MAX_SEQUENCE) for h in range(heads)]
            keep = torch.stack(masks, dim=1)
            if slot is not None:
                keep = keep.new_zeros(sequences * max_seqlen, heads, max_seqlen).index_copy(0, slot, keep)
            keep = keep.view(sequences, max_seqlen, heads, max_seqlen).transpose(1, 2)
            out = (weights * keep * keep_scale(dropout_p)) @ v
    out = out.transpose(1, 2).reshape(sequences * max_seqlen, heads, dim)
    return (out if slot is None else out.index_select(0, slot)).to(qkv_t3hd.dtype)
