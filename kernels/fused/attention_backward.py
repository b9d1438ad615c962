"""Backward kernels of attention over many tiles: one for dq, which also computes delta, then one for dk and dv.

Dao, "FlashAttention-2", ICLR 2024, but with no atomic additions: the weights are computed twice, and the gradient has the
same bits every time. Each kernel writes its part of the gradient of the packed q, k, v in place.
"""

import triton
import triton.language as tl

from kernels.fused.attention_forward import keep_weights, kept_scale
from kernels.fused.attention_geometry import LOG2E, alibi_slope, find_tile, split_tiles


@triton.jit(do_not_specialize=["sequences", "site", "threshold"])
def attention_backward_dq(
    qkv,
    cu_seqlens,
    out,
    lse,
    statistics,
    grad_out,
    grad_qkv,
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
    EDGE: tl.constexpr,
):
    """One program a tile of queries and head. It leaves two pairs a query in `statistics` for the other kernel:

    the log-sum-exp, with what ALiBi adds to it for the query's distance from the first of the EDGE tokens around it
    (in the second pair: from the last), and delta_i = sum_d out_id grad_out_id.
    """
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
    head_place = start.to(tl.int64) * STRIDE + head * DIM
    k_head = qkv + head_place + HEADS * DIM
    v_head = k_head + HEADS * DIM
    offsets = n[:, None] * STRIDE + d[None, :]
    q_tile = head_place + first * STRIDE
    q_offsets = m[:, None] * STRIDE + d[None, :]
    out_tile = (start + first).to(tl.int64) * (HEADS * DIM) + head * DIM
    out_offsets = m[:, None] * (HEADS * DIM) + d[None, :]
    q = tl.load(qkv + q_tile + q_offsets, mask=inside[:, None], other=0.0)
    do = tl.load(grad_out + out_tile + out_offsets, mask=inside[:, None], other=0.0)
    o = tl.load(out + out_tile + out_offsets, mask=inside[:, None], other=0.0)
    delta_m = tl.sum(o.to(wide) * do.to(wide), 1)
    place = head.to(tl.int64) * rows + row + first + m
    lse_m = tl.load(lse + place, mask=inside, other=0.0)
    from_left = slope * SCALE * ((first + m) % EDGE).to(wide)
    from_right = slope * SCALE * (EDGE - 1 - (first + m) % EDGE).to(wide)
    pairs = statistics + 2 * place[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pairs, tl.join(lse_m + from_left, delta_m), mask=inside[:, None])
    tl.store(pairs + 2 * HEADS * rows.to(tl.int64), tl.join(lse_m + from_right, delta_m), mask=inside[:, None])
    n_wide = n.to(wide)

    dq = tl.zeros([BLOCK_M, DIM], wide)
    off, rest, band, skip = split_tiles(first, length, BLOCK_M, BLOCK_N)
    for tile in tl.range(0, off):
        left = tile < band
        j = tl.where(left, tile, tile + skip) * BLOCK_N
        k = tl.load(k_head + j * STRIDE + offsets)
        v = tl.load(v_head + j * STRIDE + offsets)
        score = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=wide)
        signed = tl.where(left, slope, -slope)
        shift = lse_m + signed * SCALE * (first - j + m).to(wide)
        p = tl.exp2(tl.fma(signed, n_wide[None, :], score) * SCALE - shift[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION, out_dtype=wide)
        if DROPOUT:
            kept = keep_weights(keys, token_i, head, (j + n)[None, :], site, threshold, inside[:, None])
            dp = tl.where(kept, dp * kept_scale(threshold, wide), 0.0)
        ds = p * (dp - delta_m[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=wide)

    for tile in tl.range(0, rest):
        j = tl.where(tile < skip, band + tile, (length - 1) // BLOCK_N) * BLOCK_N
        inside_n = j + n < length
        k = tl.load(k_head + j * STRIDE + offsets, mask=inside_n[:, None], other=0.0)
        v = tl.load(v_head + j * STRIDE + offsets, mask=inside_n[:, None], other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=wide)
        place_n = tl.where(inside_n, slope * n_wide, float("inf"))  # keys past the end are infinitely far away
        score -= tl.abs((slope * (first - j + m).to(wide))[:, None] - place_n[None, :])
        p = tl.exp2(score * SCALE - lse_m[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION, out_dtype=wide)
        if DROPOUT:
            kept = keep_weights(keys, token_i, head, (j + n)[None, :], site, threshold, inside[:, None])
            dp = tl.where(kept, dp * kept_scale(threshold, wide), 0.0)
        ds = p * (dp - delta_m[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=wide)

    dq *= SCALE / LOG2E
    tl.store(grad_qkv + q_tile + q_offsets, dq.to(grad_qkv.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["sequences", "site", "threshold"])
def attention_backward_dkdv(
    qkv,
    cu_seqlens,
    statistics,
    grad_out,
    grad_qkv,
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
    EDGE: tl.constexpr,
):
    """One program a tile of keys and head. Scores are held transposed, [keys, queries], as dk and dv take them."""
    start, length, row, first = find_tile(tl.program_id(0), cu_seqlens, sequences, BLOCK_N)
    if first >= length:
        return
    head = tl.program_id(1)
    wide: tl.constexpr = statistics.dtype.element_ty
    slope = alibi_slope(head, POWER, wide) * (LOG2E / SCALE)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    d = tl.arange(0, DIM)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = first + n < length
    key_j = (first + n)[:, None]
    head_place = start.to(tl.int64) * STRIDE + head * DIM
    q_head = qkv + head_place
    do_head = grad_out + start.to(tl.int64) * (HEADS * DIM) + head * DIM
    q_offsets = m[:, None] * STRIDE + d[None, :]
    do_offsets = m[:, None] * (HEADS * DIM) + d[None, :]
    k_tile = head_place + HEADS * DIM + first * STRIDE
    k_offsets = n[:, None] * STRIDE + d[None, :]
    k = tl.load(qkv + k_tile + k_offsets, mask=inside[:, None], other=0.0)
    v = tl.load(qkv + k_tile + HEADS * DIM + k_offsets, mask=inside[:, None], other=0.0)
    statistics += 2 * (head.to(tl.int64) * rows + row)
    other_side = 2 * HEADS * rows.to(tl.int64)
    pairs = 2 * m[:, None] + tl.arange(0, 2)[None, :]
    place_m = slope * m.to(wide)

    dk = tl.zeros([BLOCK_N, DIM], wide)
    dv = tl.zeros([BLOCK_N, DIM], wide)
    off, rest, band, skip = split_tiles(first, length, BLOCK_N, BLOCK_M)
    for tile in tl.range(0, off):
        left = tile < band  # queries left of the keys
        i = tl.where(left, tile, tile + skip) * BLOCK_M
        q = tl.load(q_head + i * STRIDE + q_offsets)
        do = tl.load(do_head + i * (HEADS * DIM) + do_offsets)
        shift, delta_m = tl.split(tl.load(statistics + tl.where(left, other_side, 0) + 2 * i + pairs))
        score = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=wide)
        # -slope |i - j| less the part of a query, which is in `shift` already.
        edge = i // EDGE * EDGE + tl.where(left, EDGE - 1, 0)
        term = tl.where(left, -slope, slope) * SCALE * (first - edge + n).to(wide)
        p = tl.exp2(score * SCALE + (term[:, None] - shift[None, :]))
        dp = tl.dot(v, do.T, input_precision=PRECISION, out_dtype=wide)
        used = p
        if DROPOUT:
            kept = keep_weights(keys, start + (i + m)[None, :], head, key_j, site, threshold, m[None, :] >= 0)
            dp = tl.where(kept, dp * kept_scale(threshold, wide), 0.0)
            used = tl.where(kept, p, 0.0)
        dv = tl.dot(used.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=wide)
        ds = p * (dp - delta_m[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=wide)

    for tile in tl.range(0, rest):
        i = tl.where(tile < skip, band + tile, (length - 1) // BLOCK_M) * BLOCK_M
        inside_m = i + m < length
        q = tl.load(q_head + i * STRIDE + q_offsets, mask=inside_m[:, None], other=0.0)
        do = tl.load(do_head + i * (HEADS * DIM) + do_offsets, mask=inside_m[:, None], other=0.0)
        # A mask would cut this load into single words; what stands past the end is thrown away, and p is 0 there.
        shift, delta_m = tl.split(tl.load(statistics + 2 * i + pairs))
        lse_m = tl.where(inside_m, shift - (place_m + slope * (i % EDGE).to(wide)) * SCALE, float("inf"))
        delta_m = tl.where(inside_m, delta_m, 0.0)
        score = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=wide)
        score -= tl.abs((slope * (first - i + n).to(wide))[:, None] - place_m[None, :])
        p = tl.exp2(score * SCALE - lse_m[None, :])
        dp = tl.dot(v, do.T, input_precision=PRECISION, out_dtype=wide)
        used = p
        if DROPOUT:
            kept = keep_weights(keys, start + (i + m)[None, :], head, key_j, site, threshold, inside_m[None, :])
            dp = tl.where(kept, dp * kept_scale(threshold, wide), 0.0)
            used = tl.where(kept, p, 0.0)
        dv = tl.dot(used.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=wide)
        ds = p * (dp - delta_m[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=wide)

    dk *= SCALE / LOG2E
    if DROPOUT:
        dv *= kept_scale(threshold, wide)
    tl.store(grad_qkv + k_tile + k_offsets, dk.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_qkv + k_tile + HEADS * DIM + k_offsets, dv.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
