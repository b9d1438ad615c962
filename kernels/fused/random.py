"""The generator of `kernels.random` as device functions: the same bits, so that dropout masks need not be stored.

One 64-bit word decides four neighbouring elements. The functions are element-wise all the same: where a thread's registers
hold such neighbours, the compiler sees the same word computed four times and keeps one. It does where the place among the
neighbours is an axis of the tile, which then lies in registers: tiles [runs, 8], a run being a 16-byte load of a 16-bit type
(`keep_runs`).
"""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def fork(key, n):
    """Child `n` (>= 0) of `key`, as in `kernels.random.fork`.

    Args:
        key: int64 or uint64, scalar or tile.
        n: any integer, scalar or tile that broadcasts against `key`.

    Returns:
        uint64, whose arithmetic wraps and whose right shifts bring in zeros, with the bits of the int64 of `kernels.random`.
    """
    z = tl.cast(key, tl.uint64) + tl.cast(n, tl.uint64) * _GOLDEN + _GOLDEN
    z = (z ^ (z >> 30)) * _MULTIPLY_1
    z = (z ^ (z >> 27)) * _MULTIPLY_2
    return z ^ (z >> 31)


@triton.jit
def keep_lane(seed, group, lane, threshold):
    """Whether dropout keeps element 4 * `group` + `lane` % 4 of a row.

    Args:
        seed: fork(key of the row, site).
        group: number of the word in the row.
        lane: which 16 bits of the word, modulo 4, lowest first.
        threshold: `kernels.random.drop_threshold` of the probability, below 65536.

    Returns:
        bool of the shape that `seed`, `group` and `lane` broadcast to.
    """
    word = fork(seed, group)
    half = tl.where(lane % 4 >= 2, word >> 32, word).to(tl.uint32).to(tl.int32, bitcast=True)
    # The lane in the upper 16 bits. What stays below it doesn't change the outcome: the threshold has zeros there.
    return (half << (16 - lane % 2 * 16)) >= (threshold - 32768) * 65536


@triton.jit
def keep(seed, element, threshold):
    """Whether dropout keeps an element of a row, for tiles of any layout. Neighbours of one thread share their words."""
    return keep_lane(seed, element // 4, element % 4, threshold)


@triton.jit
def keep_runs(seeds, runs, threshold):
    """The same for runs of eight neighbours, in the shape that makes it cheap: about 11 instructions an element.

    Args:
        seeds: fork(key, site), a scalar or [n, 1].
        runs: [n, 1], numbers of the runs: elements 8 * run to 8 * run + 7 of a row.

    Returns:
        bool [n, 8].
    """
    lane = tl.arange(0, 8)[None, :]
    return keep_lane(seeds, runs * 2 + lane // 4, lane, threshold)


@triton.jit
def drop_runs(x, seeds, runs, THRESHOLD: tl.constexpr):
    """Dropout of x [n, 8], by a product as in the plain twin: a NaN stays one where it is dropped."""
    keep = keep_runs(seeds, runs, THRESHOLD)
    return x * tl.where(keep, tl.full((), 65536 / (65536 - THRESHOLD), x.dtype), 0)
