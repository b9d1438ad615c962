"""The sketches of all units of a dataset, laid out for the search: ranks, and partitions of the hash space.

A sequence's rank is its place in the order of precedence: all of validation before all of training, each by unit and number.
Of duplicates the lowest rank is kept.

The hash space is cut into a power of two of partitions, as many as the size of the sketches asks for, so that every task of
an array makes the same cut. A partition is sorted in memory and only the hashes of at least two sequences are stored:

    duplicates/part-0003-of-0016.npy   uint64, sorted: the rest of the hash, then the rank in `rank_bits`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, write_atomically
from data_prep.dataset import npy_bytes
from data_prep.duplicates.sketch import HASH_BITS, ROW_BITS, SEQUENCE_ROW, VALID, hashes_path, sequences_path

SEQUENCE = np.dtype([("unit", "<u4"), ("split", "u1"), ("number", "<u4")])  # one of the dataset; split: index in SPLITS
PARTITION_BYTES = 64 << 20  # of keys sorted at a time
REMEDY = "remove the .json of its number beside it and run the same `python -m data_prep shard` again"


class Sketches:
    """What the tasks left about the sequences of `units`.

    Attributes:
        sequences: of all units.
        partitions: into which the hash space is cut.
        rank_bits: of a key in a partition's file; the bits above it tell the hash.
    """

    def __init__(self, work: Path, units: Sequence[int], partition_bytes: int = PARTITION_BYTES) -> None:
        """InputError if a unit's sketches are missing, or are not what this version writes."""
        self.work, self.units = work, list(units)
        counts, keys = np.zeros((2, len(self.units)), dtype=np.int64), 0  # of validation, of training
        for place in range(len(self.units)):
            rows = self.rows(place)
            counts[0, place] = np.count_nonzero(rows["split"] == VALID)
            counts[1, place] = len(rows) - counts[0, place]
            keys += len(self._keys(place))
        ends = np.cumsum(counts)  # of [validation of the units, training of the units]
        self._first = (ends - counts.ravel()).reshape(counts.shape)  # rank of the first sequence
        self._counts = counts
        self.sequences = int(ends[-1]) if len(ends) else 0
        # Hash and rank fit 64 bits: as many partitions as ranks need bits beyond those of a row.
        enough = max(-(-keys * 8 // partition_bytes), -(-self.sequences >> ROW_BITS), 1)
        self._partition_bits = (enough - 1).bit_length()
        self.partitions = 1 << self._partition_bits
        self.rank_bits = ROW_BITS + self._partition_bits

    def rows(self, place: int) -> NDArray[np.void]:
        """The table of the sequences of units[place] (SEQUENCE_ROW), memory-mapped."""
        return _mapped(sequences_path(self.work, self.units[place]), SEQUENCE_ROW)

    def _keys(self, place: int) -> NDArray[np.uint64]:
        return _mapped(hashes_path(self.work, self.units[place]), np.dtype("<u8"))

    def column(self, name: str) -> NDArray:
        """A column of the sequences' tables, by rank. [sequences]"""
        values = np.empty(self.sequences, dtype=SEQUENCE_ROW[name])
        for place in range(len(self.units)):
            rows, (valid, _) = self.rows(place), self._counts[:, place]
            for part, first in ((rows[:valid], self._first[0, place]), (rows[valid:], self._first[1, place])):
                values[first : first + len(part)] = part[name]
        return values

    def marked(self, which: NDArray[np.void]) -> NDArray[np.bool_]:
        """Whether each sequence, by rank, is in `which` (SEQUENCE). [sequences]"""
        found, keys = np.zeros(self.sequences, dtype=np.bool_), _numbers(which)
        for place, unit in enumerate(self.units):
            rows, (valid, _) = self.rows(place), self._counts[:, place]
            mine = np.isin(_numbers(rows), keys[which["unit"] == unit])
            for part, first in ((mine[:valid], self._first[0, place]), (mine[valid:], self._first[1, place])):
                found[first : first + len(part)] = part
        return found

    def unit_of(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place in `units` of the sequences of these ranks."""
        first = self._first.ravel()
        return (np.searchsorted(first, ranks, side="right") - 1) % max(1, len(self.units))

    def path(self, partition: int) -> Path:
        """The file of the hashes that sequences share."""
        return self.work / "duplicates" / f"part-{partition:04d}-of-{self.partitions:04d}.npy"

    def prepare(self, partition: int) -> None:
        """Write the partition's file unless it is there. Two tasks that do so at once write the same bytes."""
        if self.path(partition).is_file():
            return
        width = (1 << HASH_BITS) >> self._partition_bits
        low, high = (np.uint64(bound << ROW_BITS) for bound in (partition * width, (partition + 1) * width - 1))
        high |= np.uint64((1 << ROW_BITS) - 1)
        parts = [np.empty(0, np.uint64)]
        for place in range(len(self.units)):
            keys = self._keys(place)
            keys = keys[np.searchsorted(keys, low) : np.searchsorted(keys, high, side="right")] - low
            row = (keys & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)
            valid, first = self._counts[0, place], self._first[:, place]
            rank = row + np.where(row < valid, first[0], first[1] - valid)
            parts.append(keys >> np.uint64(ROW_BITS) << np.uint64(self.rank_bits) | rank.astype(np.uint64))
        keys = np.concatenate(parts)
        del parts
        keys.sort()
        if len(keys):
            hashes = keys >> np.uint64(self.rank_bits)
            same = np.concatenate([[False], hashes[1:] == hashes[:-1], [False]])  # as the one before
            keys = keys[same[:-1] | same[1:]]
        write_atomically(self.path(partition), npy_bytes(keys))

    def shared(self, partition: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hash and rank of all sequences with a hash that another has, too, sorted by both. Prepares what is missing."""
        self.prepare(partition)
        keys = _mapped(self.path(partition), np.dtype("<u8"), "remove it and run the same again")
        bits = np.uint64(self.rank_bits)
        return keys >> bits, (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def _numbers(sequences: NDArray[np.void]) -> NDArray[np.int64]:
    """Split and number of sequences of one unit in one number."""
    return (sequences["split"].astype(np.int64) << 32) + sequences["number"]


def _mapped(path: Path, dtype: np.dtype, remedy: str = REMEDY) -> NDArray:
    """The .npy file at `path`, memory-mapped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {remedy}") from None
    except (ValueError, EOFError):
        raise InputError(f"{path}: damaged; {remedy}") from None
    if array.dtype != dtype:
        raise InputError(f"{path}: not of this version; shard again to another --out")
    return array
