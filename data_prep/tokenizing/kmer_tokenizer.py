"""Tokenizers of fixed-length words, which need no training: their files, and encoding by table look-up.

`kmer`: non-overlapping k-mers as in the Nucleotide Transformer (Dalla-Torre et al. 2024): k-mers from the left, single bases
for what is left over before another letter or the end, N. The file cuts plain text by a regular expression, so that it works
wherever it is loaded.

`overlapping-kmer`: a k-mer at every position, as in DNABERT (Ji et al. 2021). The `tokenizers` library can't make such
pieces out of plain text; the file takes DNABERT's own convention, k-mers with spaces between them.

Both are encoded here from plain text, by numpy and to the same tokens: `tokenizers` looks words up as strings, tens of times
slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError
from data_prep.dataset import SPECIALS
from data_prep.kmers import encode_bases, forward_words
from data_prep.tokenizing.tokenizer_file import tokenizer_json

KMER, OVERLAPPING = "kmer", "overlapping-kmer"
KINDS = (KMER, OVERLAPPING)
K = 6
LONGEST = 7  # 4^8 k-mers and the special tokens are more than 16 bits can number
_CHUNK_BASES = 1 << 18  # of text at a time: arrays that stay in the cache
_SPACE = np.zeros(256, dtype=np.bool_)
_SPACE[np.frombuffer(b" \t\n\v\f\r", dtype=np.uint8)] = True


def vocabulary(kind: str, k: int) -> dict[str, int]:
    """Token to number: special tokens, all k-mers in the order A, C, G, T, and for `kmer` the single bases and N."""
    shortest = 1 if kind == KMER else 2
    if not shortest <= k <= LONGEST:
        raise InputError(f"--k {k}: for {kind} it must be from {shortest} to {LONGEST}")
    words = ["".join(letters) for letters in product("ACGT", repeat=k)]
    single = "ACGTN" if kind == KMER else ""
    tokens = dict.fromkeys([*SPECIALS, *words, *single])  # with k = 1 the bases are there already
    return {token: number for number, token in enumerate(tokens)}


def kmer_json(kind: str, k: int = K) -> bytes:
    """The tokenizer.json of one of KINDS. Raises InputError for a k that can't be."""
    model = {"type": "WordLevel", "vocab": vocabulary(kind, k), "unk_token": "[UNK]"}
    if kind == KMER:
        return tokenizer_json(_cutter(k), model, {"type": "Fuse"})  # the decoder: tokens without spaces between them
    return tokenizer_json({"type": "WhitespaceSplit"}, model)


def _cutter(k: int) -> dict[str, Any]:
    """The pre-tokenizer of `kmer`. Other letters than A, C, G, T stand alone: each is one [UNK], as under BPE. Spaces go."""
    return {"type": "Split", "pattern": {"Regex": f"[ACGT]{{{k}}}|\\S"}, "behavior": "Removed", "invert": True}


@dataclass(frozen=True)
class Kmers:
    """A k-mer tokenizer as tables.

    Attributes:
        words: uint16 [4^k], token of each k-mer, by its number (`kmers.forward_words`).
        letters: uint16 [256], token of each letter that stands alone.
    """

    kind: str
    k: int
    words: NDArray[np.uint16]
    letters: NDArray[np.uint16]
    unknown: int

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Content tokens of plain texts, one after the other [tokens], and how many each has [texts].

        An overlapping k-mer with another letter than A, C, G, T is [UNK]; a text shorter than k has none.
        """
        encode = self._cut if self.kind == KMER else self._overlap
        parts = [encode(group) for group in _groups(texts)]
        if not parts:
            return np.empty(0, np.uint16), np.empty(0, np.int64)
        tokens, counts = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(counts)

    def _overlap(self, texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        codes, other, _ = _codes(texts)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        ends = np.cumsum(lengths)
        tokens = self.words[forward_words(codes, self.k, np.uint16)]
        if other.any():
            before = np.append(0, np.cumsum(other))
            tokens[before[self.k :] != before[: -self.k]] = self.unknown
        inside = np.ones(len(codes), dtype=np.bool_)
        for left in range(1, self.k):  # fewer than k bases before the end of a text
            near = ends - left
            inside[near[near >= 0]] = False
        return tokens[inside[: len(tokens)]], np.maximum(lengths - self.k + 1, 0)

    def _cut(self, texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        codes, other, letters = _codes(texts)
        ends = np.cumsum([len(text) for text in texts])
        # Stretches that are cut into k-mers from their own beginning: of A, C, G, T, or one other letter.
        alone = np.flatnonzero(other)
        starts = np.unique(np.concatenate([[0], ends, alone, alone + 1]))
        lengths, starts = np.diff(starts), starts[:-1]
        if len(alone):
            seen = ~_SPACE[letters[starts]]
            lengths, starts = lengths[seen], starts[seen]
        whole = lengths // self.k
        sizes = whole + lengths % self.k  # in tokens
        number = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a token in its stretch
        whole_t = np.repeat(whole, sizes)
        places = np.repeat(starts, sizes) + np.minimum(number, whole_t) * self.k + np.maximum(number - whole_t, 0)
        long = (number < whole_t) & ~other[places]
        tokens = self.letters[letters[places]]
        tokens[long] = self.words[forward_words(codes, self.k, np.uint16)[places[long]]]
        text = np.searchsorted(ends, starts, side="right")
        return tokens, np.bincount(text, sizes, len(texts)).astype(np.int64)


def read_kmers(contents: dict[str, Any]) -> Kmers | None:
    """The tables of a tokenizer.json, given as parsed; None where it is of no kind of k-mers that is encoded here."""
    model, cutter = contents["model"], contents.get("pre_tokenizer")
    if model.get("type") != "WordLevel" or contents.get("normalizer") is not None or cutter is None:
        return None
    tokens: dict[str, int] = model["vocab"]
    k = max((len(token) for token in tokens if token not in SPECIALS), default=0)
    kind = OVERLAPPING if cutter["type"] in ("WhitespaceSplit", "Whitespace") else KMER
    if not (1 if kind == KMER else 2) <= k <= LONGEST or (kind == KMER and cutter != _cutter(k)):
        return None
    expected = vocabulary(kind, k)
    if tokens.keys() != expected.keys():
        return None
    unknown = tokens[SPECIALS[0]]
    words = [tokens[token] for token in expected if len(token) == k and token not in (*SPECIALS, "N")]
    letters = np.full(256, unknown, dtype=np.uint16)
    if kind == KMER:
        for letter in "ACGTN":
            letters[ord(letter)] = tokens[letter]
    return Kmers(kind, k, np.array(words, dtype=np.uint16), letters, unknown)


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, several at a time."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= _CHUNK_BASES:
            yield texts[first : number + 1]
            first, size = number + 1, 0
    if first < len(texts):
        yield texts[first:]


def _codes(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.uint8]]:
    """Of each letter of all texts: 0 to 3 (0 for what is no base), whether it is no base, its byte."""
    text = "".join(texts).encode("ascii", "replace")  # "?" for what is not ASCII: a letter stays one byte
    codes = encode_bases(text)
    other = codes > 3
    if other.any():
        codes = np.where(other, np.uint8(0), codes)
    return codes, other, np.frombuffer(text, dtype=np.uint8)
