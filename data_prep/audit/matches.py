"""Exact matches between the texts of evaluation sets and the sequences of a dataset, at the speed of hashing.

Every window of N bases of the evaluation texts has a 64-bit hash that both strands share; the distinct ones are sorted. Each
window of the training data is hashed too and asked of a table of bits (a Bloom filter: one bit by the hash's upper half, and
for the few that pass another by its lower half); what passes both is looked up by binary search. Nothing is sampled.

Memory: a distinct evaluation window takes 8 bytes for its hash, 8 to 16 for the bits and 1 to 8 for the sets that have it,
and some 16 more while they are collected. So GUE's test parts (27 million windows, fewer distinct) take about 1 GB, which
processes share. A shard is decoded whole, at some 4 bytes a base.

A false match needs two texts of one hash. Up to 32 bases there are none; above, a pair of windows has a chance of 2^-64,
which makes 0.05 windows for 32.5 Gbases against 27 million windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.audit.exclusions import Stretches, merge
from data_prep.codec import Codec
from data_prep.dataset import Split
from data_prep.kmers import canonical_hashes, encode_bases, reverse_complement

CHUNK_BASES = 1 << 16  # hashed at a time: the arrays then stay in a core's cache
BITS_PER_WINDOW = 64  # of the filter, at least: at most 1 in 32 of the windows that are not there pass the first bit
MAXIMUM_SETS = 64
NEIGHBOURS = 64  # sequences of the next shard that are read too: with 8 bases each more than a window reaches into


Number = TypeVar("Number", np.int64, np.uint64)


def distinct(parts: Sequence[NDArray[Number]]) -> NDArray[Number]:
    """The numbers of all parts, sorted, each once. np.unique in NumPy 2.3 and later hashes them: 15 times as long."""
    every = np.sort(np.concatenate(parts))
    return every[np.diff(every, prepend=~every[:1]) != 0]


@dataclass(frozen=True)
class Texts:
    """Stretches of A, C, G, T laid end to end; a window lies within one of them."""

    codes: NDArray[np.uint8]  # [bases]
    ends: NDArray[np.int64]  # [stretches] where each ends in `codes`

    @staticmethod
    def of(stretches: Sequence[bytes]) -> Texts:
        """Lay these end to end."""
        return Texts(encode_bases(b"".join(stretches)), np.cumsum([len(each) for each in stretches], dtype=np.int64))

    def hashes(self, length: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Chunks of `canonical_hashes`, with the position of their first window; those over an edge are not yet left out."""
        for start in range(0, len(self.codes) - length + 1, CHUNK_BASES):
            yield start, canonical_hashes(self.codes[start : start + CHUNK_BASES + length - 1], length)

    def whole(self, positions: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
        """Which of the windows that begin at `positions` lie within one stretch."""
        return positions + length <= self.ends[np.searchsorted(self.ends, positions, side="right")]

    def windows(self, length: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Chunks of: where the windows begin in `codes`, and their hashes; both [windows]."""
        for start, hashes in self.hashes(length):
            inside = np.flatnonzero(self.whole(np.arange(start, start + len(hashes)), length))
            yield inside + start, hashes[inside]


class Windows:
    """The distinct windows of the evaluation sets.

    Attributes:
        length: bases of a window.
        hashes: uint64 [windows], sorted.
        sets: unsigned [windows], bit i: the window stands in a text of set i.
    """

    def __init__(self, length: int, parts: Sequence[tuple[int, Texts]]) -> None:
        """`parts` are texts with the number of the set they belong to, below MAXIMUM_SETS."""
        self.length = length
        none = np.empty(0, np.uint64)
        found = [distinct([none, *(hashes for _, hashes in texts.windows(length))]) for _, texts in parts]
        self.hashes = distinct([none, *found])
        bits = max((number for number, _ in parts), default=0) + 1
        self.sets = np.zeros(len(self.hashes), dtype=np.min_scalar_type((1 << bits) - 1))
        for (number, _), hashes in zip(parts, found, strict=True):
            self.sets[np.searchsorted(self.hashes, hashes)] |= self.sets.dtype.type(1 << number)
        self._slots = max(16, (BITS_PER_WINDOW * len(self.hashes)).bit_length())
        self._filter = np.zeros(1 << (self._slots - 3), np.uint8)
        for start in range(0, len(self.hashes), CHUNK_BASES):
            for use in (0, 1):
                byte, bit = self._place(self.hashes[start : start + CHUNK_BASES], use)
                for number in range(8):  # an index may repeat where all set the same bit
                    self._filter[byte[bit == number]] |= np.uint8(1 << number)

    def _place(self, hashes: NDArray[np.uint64], use: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Byte and bit of the filter, by the hashes' upper half (`use` 0) or lower half (1)."""
        slot = (hashes << np.uint64(32 * use) >> np.uint64(64 - self._slots)).view(np.int64)
        return slot >> 3, slot.astype(np.uint8) & np.uint8(7)

    def _passing(self, hashes: NDArray[np.uint64], use: int) -> NDArray[np.int64]:
        byte, bit = self._place(hashes, use)
        return np.flatnonzero((self._filter.take(byte) >> bit & np.uint8(1)).view(bool))

    def find(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of `hashes` are there, and their rows in `self.hashes`; both [found]."""
        if not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        candidates = self._passing(hashes, 0)
        candidates = candidates[self._passing(hashes[candidates], 1)]
        row = np.minimum(np.searchsorted(self.hashes, hashes[candidates]), len(self.hashes) - 1)
        there = self.hashes[row] == hashes[candidates]
        return candidates[there], row[there]

    def search(self, texts: Texts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where windows that are there begin in `texts.codes`, ascending, and their rows in `self.hashes`; both [found]."""
        positions, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for start, hashes in texts.hashes(self.length):
            where, row = self.find(hashes)
            inside = texts.whole(where + start, self.length)
            positions.append(where[inside] + start)
            rows.append(row[inside])
        return np.concatenate(positions), np.concatenate(rows)


@dataclass(frozen=True)
class ShardMatches:
    """What one shard has in common with the evaluation sets."""

    species: int  # row of the manifest's species table
    sequences: int
    bases: int  # of the sequences of both strands
    rows: NDArray[np.int64]  # [distinct windows found] of `Windows.hashes`
    stretches: Stretches  # of the genome, merged


def search_shard(split: Split, row: int, codec: Codec, windows: Windows) -> ShardMatches:
    """Find the windows in the text of one shard. Raises DamagedBlock, or OSError.

    Sequences that follow each other in a contig are joined first, so that a window across the edge of two sequences, blocks
    or shards is found too. Sequences of the reverse strand are turned into forward ones: with the paper's packing they cover
    bases that no forward sequence does.
    """
    shard = split.shards[row]
    species, sequences = int(shard["species"]), int(shard["sequences"])
    source, texts = _decode(split, row, range(int(shard["blocks"])), codec)
    bases = sum(map(len, texts))
    if row + 1 < len(split.shards) and split.shards["species"][row + 1] == species:
        more, texts_more = _decode(split, row + 1, range(1), codec, NEIGHBOURS)
        source, texts = np.concatenate([source, more]), texts + texts_more
    contig, start, laid = _join(source, texts)
    positions, rows = windows.search(laid)
    run = np.searchsorted(laid.ends, positions, side="right")
    first = laid.ends - np.diff(laid.ends, prepend=0)  # of each run in the codes
    place = start[run] + positions - first[run]
    stretches = merge([Stretches(contig[run], place, place + windows.length, windows.sets[rows])])
    return ShardMatches(species, sequences, bases, distinct([rows]), stretches)


def _decode(
    split: Split, row: int, blocks: range, codec: Codec, limit: int | None = None
) -> tuple[NDArray[np.int64], list[bytes]]:
    """Source [sequences, 3] and forward-strand text of the sequences of some blocks; of each block the first `limit`."""
    source, texts = [], list[bytes]()
    for number in blocks:
        block = split.read_block(row, number)
        source.append(block.source[:limit])
        ends = np.cumsum(block.lengths[:limit], dtype=np.int64)
        for end, length, strand in zip(ends.tolist(), block.lengths.tolist(), block.source[:, 2].tolist(), strict=False):
            text = codec.decode(block.tokens[end - length : end])
            texts.append(text if strand > 0 else reverse_complement(text))
    return np.concatenate(source), texts


def _join(source: NDArray[Any], texts: list[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64], Texts]:
    """Contig [runs], start [runs] and text of the runs of sequences of one strand that follow each other without a gap."""
    order = np.lexsort((source[:, 1], source[:, 2], source[:, 0]))
    contig, start, strand = source[order].T
    end = start + np.array([len(texts[each]) for each in order.tolist()])
    same = (np.diff(contig) == 0) & (np.diff(strand) == 0) & (start[1:] == end[:-1])
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    ordered = [texts[each] for each in order.tolist()]
    runs = [b"".join(ordered[one:other]) for one, other in pairwise([*first.tolist(), len(order)])]
    return contig[first], start[first], Texts.of(runs)
