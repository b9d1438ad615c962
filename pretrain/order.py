"""The order of training: which sequence stands at a position, by arithmetic alone.

An epoch lays the shards end to end in a keyed random order and cuts this axis of N sequences into S streams of
L = floor(N / S) sequences; the fewer than S that remain are left out, others each epoch. Within a stream, windows of
W sequences follow each other, and inside each window the sequences are permuted by key. Position p takes stream p mod S
and the next sequence of that stream. So a batch mixes S distant places of the genomes, every sequence comes at most once an
epoch, and there is nothing to save but p: no shuffle buffer, no epoch file.

S and W stand in the dataset's manifest; batch size and number of ranks play no part. Where the batch size divides S, a
rank meets always the same streams, so all ranks together read the dataset about once an epoch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError
from data_prep.dataset import SEQUENCES_PER_BLOCK
from kernels.random import PURPOSE_SHARDS, PURPOSE_WINDOWS, fork, root_key


class Place(NamedTuple):
    """Sequence `sequence` of the shard that stands in row `row` of shards.npy."""

    row: int
    sequence: int


class Order:
    """Maps global positions to places. Memory: 16 bytes a shard and one permutation of W numbers a stream in use.

    Args:
        sequences: [shards], sequences of each shard, in the order of shards.npy.
        streams, window_blocks: from the manifest's `order`.
        seed: of the run.
    """

    def __init__(self, sequences: NDArray[np.integer], streams: int, window_blocks: int, seed: int) -> None:
        self.sequences = np.asarray(sequences, dtype=np.int64)
        total = int(self.sequences.sum())
        if total == 0:
            raise InputError("the training split holds no sequence; shard more bases or lower --valid-fraction")
        self.streams = min(streams, total)
        self.window = window_blocks * SEQUENCES_PER_BLOCK
        self.stream_length = total // self.streams  # L
        self.epoch_length = self.streams * self.stream_length
        self._shards_key, self._windows_key = root_key(seed, PURPOSE_SHARDS), root_key(seed, PURPOSE_WINDOWS)
        # A global batch meets every stream, and around an epoch's end the streams of two epochs.
        self._window_permutation = lru_cache(maxsize=2 * self.streams)(self._permute_window)
        self._shard_axis = lru_cache(maxsize=2)(self._lay_shards)

    def _lay_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard rows in this epoch's order, and where each begins on the axis of sequences."""
        keys = fork(fork(np.array([self._shards_key]), epoch), np.arange(len(self.sequences)))
        rows = np.argsort(keys, kind="stable")
        return rows, np.cumsum(self.sequences[rows]) - self.sequences[rows]

    def _permute_window(self, epoch: int, stream: int, window: int) -> NDArray[np.int64]:
        length = min(self.window, self.stream_length - window * self.window)
        key = fork(fork(fork(np.array([self._windows_key]), epoch), stream), window)
        return np.argsort(fork(key, np.arange(length)), kind="stable")

    def place(self, position: int) -> Place:
        """The sequence at a global position (any integer >= 0)."""
        epoch, within = divmod(position, self.epoch_length)
        turn, stream = divmod(within, self.streams)
        window, offset = divmod(turn, self.window)
        permutation = self._window_permutation(epoch, stream, window)
        axis = stream * self.stream_length + window * self.window + int(permutation[offset])
        rows, starts = self._shard_axis(epoch)
        shard = int(np.searchsorted(starts, axis, side="right")) - 1
        return Place(int(rows[shard]), axis - int(starts[shard]))


def rank_rows(batch_size: int, rank: int, ranks: int) -> range:
    """The rows of a global batch that a rank takes: any number of ranks, sizes that differ by at most one."""
    return range(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)


def micro_batches(batch_size: int, ranks: int, micro_batch_size: int) -> int:
    """Micro batches a step, the same on every rank: as many as the rank with the most rows needs."""
    most = -(-batch_size // ranks)
    return -(-most // micro_batch_size)
