"""Which part of attention a program computes, without a list made on the host: its sequence, its tile, its head's slope.

The programs of a sequence that starts at token c, the s-th of the batch, begin at c // BLOCK + s, which rises with s and
leaves room for every tile. So a program finds its sequence by a search in `cu_seqlens`, and the grid of
tokens // BLOCK + sequences programs depends on shapes only: no copy to the host, no wait for the device.

Rows of statistics (log-sum-exp, delta) are laid out by the same rule with blocks of 16: each sequence's begin at a multiple
of 64 bytes, so that they load in whole vectors.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
STATISTICS_BLOCK = tl.constexpr(16)
STATISTICS_SPARE = tl.constexpr(128)  # rows after the last: a tile of statistics is read whole, past the end of its sequence
_FAN = tl.constexpr(128)  # sequences that a step of the search looks at


@triton.jit
def find_tile(program, cu_seqlens, sequences, BLOCK: tl.constexpr):
    """Returns (start of the sequence in tokens, its length, its first row of statistics, first token of the tile in it).

    The last is not below the length where the program has nothing to do.
    """
    lane = tl.arange(0, _FAN)
    sequence = 0  # the last one known to begin at or before this program
    candidates = sequences
    while candidates > 1:
        step = tl.cdiv(candidates, _FAN)
        candidate = sequence + lane * step
        inside = lane * step < candidates
        begins = tl.load(cu_seqlens + candidate, mask=inside, other=0) // BLOCK + candidate
        passed = (tl.sum((inside & (begins <= program)).to(tl.int32), 0) - 1) * step
        sequence += passed
        candidates = tl.minimum(step, candidates - passed)
    start, length, row = find_sequence(sequence, cu_seqlens)
    return start, length, row, (program - start // BLOCK - sequence) * BLOCK


@triton.jit
def find_sequence(sequence, cu_seqlens):
    """Returns (start in tokens, length, first row of statistics)."""
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    row = (start // STATISTICS_BLOCK + sequence) * STATISTICS_BLOCK
    return start, length, tl.multiple_of(row, 16)


@triton.jit
def split_tiles(first, length, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Sorts the tiles of OTHER tokens that a program of tokens `first` to `first` + OWN - 1 has to pass over.

    Off the diagonal |i - j| has one sign and takes a term a row and a term a column; a whole tile needs no mask. Tiles that
    are neither (those on the diagonal and the ragged one at the end) are few and take the general form.

    Returns:
        (off: how many whole tiles are off the diagonal, rest: how many others, band: the first tile on the diagonal, skip:
        how many are on it). The n-th tile off the diagonal is n, or n + skip from `band` on. The n-th of the rest is
        band + n below `skip`; one more is the ragged tile, (length - 1) // OTHER.
    """
    whole = length // OTHER
    tiles = tl.cdiv(length, OTHER)
    band = first // OTHER
    band_end = tl.minimum(tl.cdiv(first + OWN, OTHER), tiles)
    off = band + tl.maximum(whole - band_end, 0)
    ragged = (whole < tiles) & (band_end < tiles)
    return off, band_end - band + ragged.to(tl.int32), band, band_end - band


@triton.jit
def alibi_slope(head, POWER: tl.constexpr, wide: tl.constexpr):
    """Slope of a head, as `kernels.plain.attention.alibi_slopes`; POWER is the largest power of two not above the heads."""
    exponent = tl.where(head < POWER, 8 * (head + 1), 4 * (2 * (head - POWER) + 1))
    return tl.exp2(-exponent.to(wide) / POWER)
