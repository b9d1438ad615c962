"""Words of k bases at every position of a text, as 64-bit numbers, by numpy.

A base is two bits (A, C, G, T = 0 to 3, so that 3 minus a base is its complement), a word of up to 32 bases one uint64 with
the first base in the highest bits. Words are built by doubling: two neighbouring words of m bases make one of 2m, so 32-mers
take five steps over the text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_BASES = 32  # longest word
_CODES = bytes(b"ACGT".find(letter) % 256 for letter in range(256))
_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")


def encode_bases(text: bytes) -> NDArray[np.uint8]:
    """Upper-case A, C, G, T as 0 to 3, anything else as 255. uint8 [bases]."""
    return np.frombuffer(text.translate(_CODES), dtype=np.uint8)


def reverse_complement(text: bytes) -> bytes:
    """The other strand, read in its own direction. Upper-case A, C, G, T; N stays N."""
    return text.translate(_COMPLEMENT)[::-1]


def forward_words(
    codes: NDArray[np.uint8], k: int, dtype: type[np.unsignedinteger] = np.uint64
) -> NDArray[np.unsignedinteger]:
    """The word that starts at each position. `codes` [n], all 0 to 3; result [n - k + 1], empty for a shorter text."""
    return _words(codes, k, dtype, reverse=False)


def reverse_words(
    codes: NDArray[np.uint8], k: int, dtype: type[np.unsignedinteger] = np.uint64
) -> NDArray[np.unsignedinteger]:
    """The reverse complement of the word that starts at each position. As `forward_words`."""
    return _words(3 - codes, k, dtype, reverse=True)


def _words(codes, k: int, dtype, *, reverse: bool):
    if not 1 <= k <= np.dtype(dtype).itemsize * 4:
        raise ValueError(f"a word of {k} bases does not fit {np.dtype(dtype).name}")
    if len(codes) < k:
        return np.empty(0, dtype)
    power, size = codes.astype(dtype), 1  # words of `size` bases, doubled
    words, have = None, 0  # words of `have` bases: those powers of two that k is made of
    while True:
        if k & size:
            words, have = (power, size) if words is None else (_join(words, have, power, size, reverse), have + size)
        if have == k:
            return words
        power, size = _join(power, size, power, size, reverse), 2 * size


def _join(left, m: int, right, n: int, reverse: bool):
    """Words of m + n bases from those of m bases and those of n bases, which begin m later."""
    count = min(len(left), len(right) - m)
    left, right = left[:count], right[m : m + count]
    kind = left.dtype.type
    return (left | right << kind(2 * m)) if reverse else (left << kind(2 * n) | right)


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele et al. 2014), a bijection of 64-bit numbers: every bit decides on all."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def canonical_hashes(codes: NDArray[np.uint8], length: int) -> NDArray[np.uint64]:
    """A 64-bit hash of the `length` bases from each position on, the same for both strands.

    Args:
        codes: uint8 [n], all 0 to 3.
        length: up to 64. Up to 32 bases no two different texts (up to strand) have one hash; above, chance has 2^-64 a pair.

    Returns:
        uint64 [n - length + 1], empty for a shorter text.
    """
    if len(codes) < length:
        return np.empty(0, np.uint64)
    if length <= WORD_BASES:
        return mix(np.minimum(forward_words(codes, length), reverse_words(codes, length)))
    if length > 2 * WORD_BASES:
        raise ValueError(f"{length} bases: at most {2 * WORD_BASES}")
    forward, reverse = forward_words(codes, WORD_BASES), reverse_words(codes, WORD_BASES)
    count, shift = len(codes) - length + 1, length - WORD_BASES  # the two words overlap, or touch
    one = mix(forward[:count]) + np.uint64(0x9E3779B97F4A7C15) * forward[shift : shift + count]
    other = mix(reverse[shift : shift + count]) + np.uint64(0x9E3779B97F4A7C15) * reverse[:count]
    return mix(np.minimum(one, other))
