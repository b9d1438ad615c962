"""Bidirectional attention with ALiBi over sequences of any lengths laid end to end (no padding in or out)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.random import drop_threshold, keep_mask

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
    """softmax(q k^T / sqrt(D) - slope_h |i - j|) v for every sequence and head.

    Args:
        qkv_t3hd: [tokens, 3, heads, head dim], any float dtype; queries, keys, values in this order.
        cu_seqlens: int32 [sequences + 1], where each sequence starts; the first is 0, the last `tokens`.
        max_seqlen: the longest sequence in tokens, at most MAX_SEQUENCE.
        dropout_p: probability of dropping a softmax weight.
        dropout_keys_t: int64 [tokens], the key of each query token; None means no dropout.
        site: dropout site; the weight of query token i, head h, key j is element h * MAX_SEQUENCE + j of token i.

    Returns:
        [tokens, heads, head dim] in the dtype of `qkv_t3hd`. Scores, bias and softmax are fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a sequence is longer than MAX_SEQUENCE.
    """
    tokens, _, heads, dim = qkv_t3hd.shape
    if max_seqlen > MAX_SEQUENCE:
        raise ValueError(f"a sequence of {max_seqlen} tokens is over the limit of {MAX_SEQUENCE}")
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
    q, k, v = padded.view(sequences, max_seqlen, 3, heads, dim).permute(2, 0, 3, 1, 4).to(wide)
    if dropout_p == 0.0 or dropout_keys_t is None:
        with torch.autocast(device.type, enabled=False):  # it would round q, k, v and the bias to its own type
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        weights = ((q @ k.transpose(-1, -2)) / math.sqrt(dim) + bias).softmax(-1)
        masks = [keep_mask(dropout_keys_t, site, max_seqlen, dropout_p, h * MAX_SEQUENCE) for h in range(heads)]
        keep = torch.stack(masks, dim=1)
        if slot is not None:
            keep = keep.new_zeros(sequences * max_seqlen, heads, max_seqlen).index_copy(0, slot, keep)
        scale = 65536 / (65536 - drop_threshold(dropout_p))
        out = (weights * keep.view(sequences, max_seqlen, heads, max_seqlen).transpose(1, 2) * scale) @ v
    out = out.transpose(1, 2).reshape(sequences * max_seqlen, heads, dim)
    return (out if slot is None else out[slot]).to(qkv_t3hd.dtype)
