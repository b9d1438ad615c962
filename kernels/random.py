"""Randomness without an owner: a counter-based generator with the same bits on every device, rank and batch layout.

A key is a 64-bit integer and `fork(key, n)` is its n-th child. Children of children form a tree, and every random choice
of a run is a leaf: seed -> purpose -> position in the order of training -> token -> dropout site -> group of four elements.
Nothing is stored and nothing advances, so a run that is resumed, or cut over other ranks, draws what it would have drawn.

`fork` is output n of SplitMix64 seeded with the key (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, with the constants of Vigna's splitmix64.c): two 64-bit multiplications for four dropout
decisions. Philox4x32-10, in the same tensor operations, costs a CPU about five times as much (`python -m kernels bench`).

All functions take and return int64, which wraps where the definition says uint64; they accept torch tensors and numpy
arrays alike.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = TypeVar("Words", Tensor, NDArray[np.int64])


def _signed(word: int) -> int:
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)

# First children of the seed, one a purpose. The numbers are part of what a run means: never reuse one. Those from 32 on are
# fine-tuning's and stand in `finetune`.
PURPOSE_SHARDS, PURPOSE_WINDOWS, PURPOSE_MASKS, PURPOSE_DROPOUT, PURPOSE_SPECIES = 1, 2, 3, 4, 5


def fork(key: Words | int, n: Words | int) -> Words:
    """Child `n` (>= 0) of `key`: mix(key + (n + 1) * GOLDEN) modulo 2^64.

    `key` and `n` are int64 tensors or arrays that broadcast against each other; at least one of them is not an int.
    """
    return _mix(key + (_signed((n + 1) * GOLDEN) if isinstance(n, int) else (n + 1) * GOLDEN))


def _mix(z: Any) -> Any:
    # Right shifts of int64 copy the sign bit; the masks make them the logical shifts of the definition. In place from
    # the second line on: z is ours, and memory traffic is the cost on a CPU.
    t = z >> 30
    t &= (1 << 34) - 1
    z ^= t
    z *= _MULTIPLY_1
    t = z >> 27
    t &= (1 << 37) - 1
    z ^= t
    z *= _MULTIPLY_2
    t = z >> 31
    t &= (1 << 33) - 1
    z ^= t
    return z


def root_key(seed: int, purpose: int) -> int:
    """The key of one purpose of a run with this seed (any Python integer, taken modulo 2^64)."""
    return int(fork(np.array([_signed(seed)]), purpose)[0])


def uniform(words: NDArray[np.int64]) -> NDArray[np.float64]:
    """Words as numbers in [0, 1): the upper 53 bits."""
    return ((words >> 11) & ((1 << 53) - 1)).astype(np.float64) * 2.0**-53


def drop_threshold(p: float) -> int:
    """Dropout probability in units of 2^-16, as it is really applied: 0.1 becomes 6554 / 65536."""
    if not 0.0 <= p < 1.0 or round(p * 65536) == 65536:
        raise ValueError(f"dropout probability {p} is not in [0, 1), or so close to 1 that nothing would be kept")
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: one over the probability with which they are really kept."""
    return 65536 / (65536 - drop_threshold(p))


def keep_mask(keys_t: Tensor, site: int, width: int, p: float, first: int = 0) -> Tensor:
    """Which elements dropout keeps.

    Args:
        keys_t: int64 [tokens], one key a token.
        site: number of the place in the model (>= 0); different sites draw independent masks.
        width: elements a token.
        p: probability of dropping an element.
        first: the element that the mask begins with, a multiple of 4.

    Returns:
        bool [tokens, width], elements first to first + width - 1. Element e is the signed 16-bit lane e % 4 (lowest bits
        first) of word fork(fork(key, site), e // 4), and is kept when lane + 32768 >= round(p * 65536).
    """
    groups = (width + 3) // 4
    least = drop_threshold(p) - 32768
    if torch.compiler.is_compiling():
        # Inductor has no vectors of lanes within words, but of words: four answers, a byte each, make one int32.
        words = _mix(_seeds(keys_t, site)[:, None] + _multiples(keys_t, first // 4, groups))
        lanes = [((words << 48 - 16 * lane >> 48 >= least).to(torch.int32) << 8 * lane) for lane in range(4)]
        keep = (lanes[0] | lanes[1] | lanes[2] | lanes[3]).view(torch.bool)
    else:
        words = fork(fork(keys_t, site)[:, None], torch.arange(first // 4, first // 4 + groups, device=keys_t.device))
        keep = words.view(torch.int16) >= least  # little-endian on every machine that torch supports
    return keep[:, :width]


# Two parts of `fork` that a compiler must take as they are. Inductor would write the first as arithmetic of indices in C++,
# where it overflows: undefined, and GCC then leaves out iterations of the loop (seen with torch 2.13). And the number of a
# site can be a symbol, whose product with GOLDEN would not be one of 64 bits.
@torch.library.custom_op("dnabert2::multiples_of_golden", mutates_args=())
def _multiples(like: Tensor, first: int, count: int) -> Tensor:
    """What `fork` adds to a key for its children `first` to `first + count - 1`: int64 [count], on the device of `like`."""
    return (torch.arange(first, first + count, device=like.device) + 1) * GOLDEN


@_multiples.register_fake
def _(like: Tensor, first: int, count: int) -> Tensor:
    return like.new_empty(count)


@torch.library.custom_op("dnabert2::dropout_seeds", mutates_args=())
def _seeds(keys_t: Tensor, site: int) -> Tensor:
    """fork(key, site): int64 [tokens]."""
    return fork(keys_t, site)


@_seeds.register_fake
def _(keys_t: Tensor, site: int) -> Tensor:
    return torch.empty_like(keys_t)
