"""Kernels of attention for sequences of up to 128 tokens, the training shape, which is bound by memory.

All keys of a sequence and head are one tile. Backward has one program for all queries too, which reads each tensor once; so
has forward where the registers suffice, else two programs share a sequence and read its keys and values twice. There is no
dropout here and no fp32: those, and what doesn't fit the shared memory of a device, take the kernels for long sequences.
"""

import triton
import triton.language as tl

from kernels.fused.attention_geometry import LOG2E, alibi_slope, find_sequence


@triton.jit
def attention_short_forward(
    qkv,
    cu_seqlens,
    out,
    lse,
    rows,
    HEADS: tl.constexpr,
    POWER: tl.constexpr,
    DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sequences of at most BLOCK tokens, one program for BLOCK_M queries and a head; heads are neighbours, as in memory."""
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    first = tl.program_id(0) % PARTS * BLOCK_M
    head = tl.program_id(0) // PARTS % HEADS
    start, length, row = find_sequence(tl.program_id(0) // (PARTS * HEADS), cu_seqlens)
    if first >= length:
        return
    wide: tl.constexpr = lse.dtype.element_ty
    slope = alibi_slope(head, POWER, wide) * (LOG2E / SCALE)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    d = tl.arange(0, DIM)
    i = first + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK)
    inside = i < length
    inside_j = j < length
    q_head = qkv + start.to(tl.int64) * STRIDE + head * DIM
    offsets = j[:, None] * STRIDE + d[None, :]
    q = tl.load(q_head + i[:, None] * STRIDE + d[None, :], mask=inside[:, None], other=0.0)
    k = tl.load(q_head + HEADS * DIM + offsets, mask=inside_j[:, None], other=0.0)
    v = tl.load(q_head + 2 * HEADS * DIM + offsets, mask=inside_j[:, None], other=0.0)
    score = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=wide)
    place = tl.where(inside_j, slope * j.to(wide), float("inf"))  # keys past the end are infinitely far away
    score -= tl.abs((slope * i.to(wide))[:, None] - place[None, :])
    top = tl.max(score, 1) * SCALE
    p = tl.exp2(score * SCALE - top[:, None])
    total = tl.sum(p, 1)
    tl.store(lse + head.to(tl.int64) * rows + row + i, top + tl.log2(total), mask=inside)
    acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=wide)
    out_tile = out + start.to(tl.int64) * (HEADS * DIM) + head * DIM + i[:, None] * (HEADS * DIM) + d[None, :]
    tl.store(out_tile, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attention_short_backward(
    qkv,
    cu_seqlens,
    out,
    lse,
    grad_out,
    grad_qkv,
    rows,
    HEADS: tl.constexpr,
    POWER: tl.constexpr,
    DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a sequence of at most BLOCK tokens and head."""
    head = tl.program_id(0) % HEADS
    start, length, row = find_sequence(tl.program_id(0) // HEADS, cu_seqlens)
    if length == 0:
        return
    wide: tl.constexpr = lse.dtype.element_ty
    slope = alibi_slope(head, POWER, wide) * (LOG2E / SCALE)
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    d = tl.arange(0, DIM)
    i = tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    inside = i < length
    head_place = start.to(tl.int64) * STRIDE + head * DIM
    k_head = qkv + head_place + HEADS * DIM
    grad_k_head = grad_qkv + head_place + HEADS * DIM
    k_offsets = n[:, None] * STRIDE + d[None, :]
    q_offsets = i[:, None] * STRIDE + d[None, :]
    out_head = start.to(tl.int64) * (HEADS * DIM) + head * DIM
    out_offsets = i[:, None] * (HEADS * DIM) + d[None, :]
    q = tl.load(qkv + head_place + q_offsets, mask=inside[:, None], other=0.0)
    do = tl.load(grad_out + out_head + out_offsets, mask=inside[:, None], other=0.0)
    o = tl.load(out + out_head + out_offsets, mask=inside[:, None], other=0.0)
    delta_m = tl.sum(o.to(wide) * do.to(wide), 1)
    lse_m = tl.load(lse + head.to(tl.int64) * rows + row + i, mask=inside, other=float("inf"))
    i_place = slope * i.to(wide)

    dq = tl.zeros([BLOCK, DIM], wide)
    for j in tl.range(0, length, BLOCK_N):
        inside_n = j + n < length
        k = tl.load(k_head + j * STRIDE + k_offsets, mask=inside_n[:, None], other=0.0)
        v = tl.load(k_head + HEADS * DIM + j * STRIDE + k_offsets, mask=inside_n[:, None], other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=wide)
        n_place = tl.where(inside_n, slope * (j + n).to(wide), float("inf"))  # keys past the end are infinitely far away
        score -= tl.abs(i_place[:, None] - n_place[None, :])
        p = tl.exp2(score * SCALE - lse_m[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION, out_dtype=wide)
        dv = tl.dot(do.T, p.to(do.dtype), input_precision=PRECISION, out_dtype=wide).to(grad_qkv.dtype.element_ty)
        tl.store(grad_k_head + HEADS * DIM + j * STRIDE + k_offsets, dv.T, mask=inside_n[:, None])
        ds = (p * (dp - delta_m[:, None])).to(q.dtype)
        dk = tl.dot(q.T, ds, input_precision=PRECISION, out_dtype=wide) * (SCALE / LOG2E)
        tl.store(grad_k_head + j * STRIDE + k_offsets, dk.to(grad_qkv.dtype.element_ty).T, mask=inside_n[:, None])
        dq = tl.dot(ds, k, dq, input_precision=PRECISION, out_dtype=wide)
    dq *= SCALE / LOG2E
    tl.store(grad_qkv + head_place + q_offsets, dq.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
