"""Words against a plain reading of the text."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.kmers import canonical_hashes, encode_bases, forward_words, mix, reverse_complement, reverse_words
from tests.data_prep.conftest import random_bases


def number(text: bytes) -> int:
    return int("".join(str(b"ACGT".index(letter)) for letter in text), 4)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 8, 24, 31, 32])
def test_words_are_what_stands_there(k: int) -> None:
    text = random_bases(k, 100)
    windows = [text[start : start + k] for start in range(len(text) - k + 1)]
    codes = encode_bases(text)
    assert forward_words(codes, k).tolist() == [number(window) for window in windows]
    assert reverse_words(codes, k).tolist() == [number(reverse_complement(window)) for window in windows]
    assert len(forward_words(codes[: k - 1], k)) == 0


def test_short_words_in_sixteen_bits() -> None:
    codes = encode_bases(random_bases(1, 1000))
    assert (forward_words(codes, 8, np.uint16) == forward_words(codes, 8)).all()
    with pytest.raises(ValueError, match="9 bases"):
        forward_words(codes, 9, np.uint16)


@pytest.mark.parametrize("length", [5, 32, 33, 50, 64])
def test_both_strands_have_one_hash_and_other_texts_another(length: int) -> None:
    text = random_bases(length, 500)
    hashes = canonical_hashes(encode_bases(text), length)
    assert len(hashes) == len(text) - length + 1
    back = canonical_hashes(encode_bases(reverse_complement(text)), length)
    assert (hashes == back[::-1]).all()
    if length > 30:
        assert len(np.unique(hashes)) == len(hashes)
        for position in range(length):  # every base counts
            letter = b"A" if text[position : position + 1] != b"A" else b"C"
            other = text[:position] + letter + text[position + 1 : length]
            assert canonical_hashes(encode_bases(other), length)[0] != hashes[0]


def test_letters_and_mixing() -> None:
    assert encode_bases(b"ACGTNa").tolist() == [0, 1, 2, 3, 255, 255]
    assert reverse_complement(b"AACGN") == b"NCGTT"
    numbers = np.arange(100_000, dtype=np.uint64)
    mixed = mix(numbers)
    assert len(np.unique(mixed)) == len(numbers)
    bits = (mixed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.01
