"""Forward kernel of attention: tiles of queries pass over tiles of keys, with a running softmax in base 2.

Dao, "FlashAttention-2", ICLR 2024. Scores stay in units of q k^T, to which ALiBi is added as slope * sqrt(D) * |i - j|, so
that one multiply-add an element scales them and subtracts the maximum.
"""

import triton
import triton.language as tl

from kernels.fused.attention_geometry import LOG2E, alibi_slope, find_tile, split_tiles
from kernels.fused.random import fork, keep

_MAX_SEQUENCE = tl.constexpr(10_240)  # as in `kernels.plain.attention`: elements of a head in the dropout counter


@triton.jit
def keep_weights(keys, token_i, head, key_j, site, threshold, inside_i):
    """Which softmax weights dropout keeps, for queries and keys that broadcast against each other."""
    seed = fork(tl.load(keys + token_i, mask=inside_i, other=0), site)
    return keep(seed, head * _MAX_SEQUENCE + key_j, threshold)


@triton.jit
def kept_scale(threshold, wide: tl.constexpr):
    return 65536.0 / (65536 - threshold).to(wide)


@triton.jit(do_not_specialize=["sequences", "site", "threshold"])
def attention_forward(
    qkv,
    cu_seqlens,
    out,
    lse,
    keys,
    sequences,
    rows,
    site,
    threshold,
    HEADS: tl.constexpr,
    POWER: tl.constexpr,
    DIM: tl.constexpr,
    SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of queries and head. SCALE is log2(e) / sqrt(DIM)."""
    start, length, row, first = find_tile(tl.program_id(0), cu_seqlens, sequences, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    wide: tl.constexpr = lse.dtype.element_ty
    slope = alibi_slope(head, POWER, wide) * (LOG2E / SCALE)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    d = tl.arange(0, DIM)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = first + m < length
    token_i = start + (first + m)[:, None]
    q_head = qkv + start.to(tl.int64) * STRIDE + head * DIM
    k_head = q_head + HEADS * DIM
    v_head = k_head + HEADS * DIM
    offsets = n[:, None] * STRIDE + d[None, :]
    q = tl.load(q_head + first * STRIDE + m[:, None] * STRIDE + d[None, :], mask=inside[:, None], other=0.0)
    n_wide = n.to(wide)

    top = tl.full([BLOCK_M], float("-inf"), wide)  # the largest score of a row so far
    total = tl.zeros([BLOCK_M], wide)
    acc = tl.zeros([BLOCK_M, DIM], wide)
    off, rest, band, skip = split_tiles(first, length, BLOCK_M, BLOCK_N)
    for tile in tl.range(0, off):
        left = tile < band
        j = tl.where(left, tile, tile + skip) * BLOCK_N
        k = tl.load(k_head + j * STRIDE + offsets)
        score = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=wide)
        # -slope |i - j| = signed * n - term, with the distance between the tiles taken in integers.
        signed = tl.where(left, slope, -slope)
        score = tl.fma(signed, n_wide[None, :], score)
        term = signed * (first - j + m).to(wide)
        p, top, total, acc = _softmax_step(score, term, top, total, acc, SCALE)
        if DROPOUT:
            p = tl.where(keep_weights(keys, token_i, head, (j + n)[None, :], site, threshold, inside[:, None]), p, 0.0)
        v = tl.load(v_head + j * STRIDE + offsets)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=wide)

    for tile in tl.range(0, rest):
        j = tl.where(tile < skip, band + tile, (length - 1) // BLOCK_N) * BLOCK_N
        inside_n = j + n < length
        k = tl.load(k_head + j * STRIDE + offsets, mask=inside_n[:, None], other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=wide)
        place = tl.where(inside_n, slope * n_wide, float("inf"))  # keys past the end are infinitely far away
        score -= tl.abs((slope * (first - j + m).to(wide))[:, None] - place[None, :])
        p, top, total, acc = _softmax_step(score, 0.0, top, total, acc, SCALE)
        if DROPOUT:
            p = tl.where(keep_weights(keys, token_i, head, (j + n)[None, :], site, threshold, inside[:, None]), p, 0.0)
        v = tl.load(v_head + j * STRIDE + offsets, mask=inside_n[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=wide)

    tl.store(lse + head.to(tl.int64) * rows + row + first + m, top * SCALE + tl.log2(total), mask=inside)
    scale = kept_scale(threshold, wide) / total if DROPOUT else 1.0 / total
    out_tile = out + (start + first).to(tl.int64) * (HEADS * DIM) + head * DIM + m[:, None] * (HEADS * DIM) + d[None, :]
    tl.store(out_tile, (acc * scale[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _softmax_step(score, term, top, total, acc, SCALE: tl.constexpr):
    """Takes scores - `term` (a value a row) into the running softmax; returns (weights, top, total, acc)."""
    new_top = tl.maximum(top, tl.max(score, 1) - term)
    p = tl.exp2(score * SCALE - ((new_top + term) * SCALE)[:, None])
    shrink = tl.exp2((top - new_top) * SCALE)
    return p, new_top, total * shrink + tl.sum(p, 1), acc * shrink[:, None]
