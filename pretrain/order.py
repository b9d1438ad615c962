"""The order of training: which sequence stands at a position, by arithmetic alone.

An epoch lays the shards end to end: species in a keyed order, the shards of a species in a keyed order within. This axis of
N sequences is rotated by a keyed amount and cut into S equal streams of L = floor(N / S) sequences; the fewer than S that
remain are left out, others each epoch. A stream is walked through in windows of W sequences (some blocks), and inside a
window the sequences are permuted by key. A position takes one of the streams, in a fixed turn, and the next sequence of it.
So a batch is spread evenly over the axis and has its fair share of each species, every sequence comes at most once an epoch,
a stream reads its shards from front to back, and there is nothing to save but p: no shuffle buffer, no epoch file.

Windows of different streams begin at different times, else all streams would open new blocks in the same steps, on all
ranks at once. Row i of a batch always meets the same streams, which are neighbours on the axis (`streams_in_use`); so a
rank, whose rows are neighbours, needs no block that another rank needs, but for those in which a stream begins or ends.

With sampling weights a species gives a fixed number of sequences to each epoch: its shards, in a keyed order of their own in
each pass, are consumed by a counter, and what falls to an epoch are pieces of shards, laid on the axis in the place of whole
shards. All numbers are int64, so positions go up to 2^63.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError
from data_prep.dataset import SEQUENCES_PER_BLOCK
from kernels.random import PURPOSE_SHARDS, PURPOSE_SPECIES, PURPOSE_WINDOWS, fork, root_key, uniform

Ints = NDArray[np.int64]

VERSION = 1  # of the arithmetic below; another one is another order of training
ROUNDS = 6  # of the Feistel network; Luby and Rackoff (1988) need four, windows of a few sequences profit from more
LEAST_STREAM = 8  # sequences; shorter streams would leave out too much of a small dataset at the end of an epoch
_GOLDEN_32 = 0x9E3779B1  # 2^32 divided by the golden ratio: multiples modulo 2^32 spread evenly


class Axis(NamedTuple):
    """The pieces of shards of one epoch, end to end."""

    rows: Ints  # [pieces] row of shards.npy
    first: Ints  # [pieces] where the piece begins in its shard; without sampling weights 0
    starts: Ints  # [pieces] where the piece begins on the axis
    rotation: int  # where on the axis the first stream begins


class Order:
    """Maps global positions to places. Memory: 40 bytes a shard, 64 once a second epoch has begun.

    Args:
        sequences: [shards], sequences of each shard, in the order of shards.npy.
        streams: in use; see `streams_in_use`.
        window_blocks: from the manifest's `order`.
        seed: of the run.
        species: [shards], the species of each shard; None: there is only one.
        batch_size: of the run; matters to the order where it divides `streams`. None: as many.
        draws: [species], how many sequences of each species an epoch has (`pretrain.sampling`); None: all, once.
    """

    def __init__(
        self,
        sequences: NDArray[np.integer],
        streams: int,
        window_blocks: int,
        seed: int,
        *,
        species: NDArray[np.integer] | None = None,
        batch_size: int | None = None,
        draws: Sequence[int] | None = None,
    ) -> None:
        self.sequences = np.ascontiguousarray(sequences, dtype=np.int64)
        total = int(self.sequences.sum())
        if total == 0:
            raise InputError("the training split holds no sequence; shard more bases or lower --valid-fraction")
        self.axis_length = total if draws is None else sum(draws)
        self.streams = min(streams, self.axis_length)
        self.window = window_blocks * SEQUENCES_PER_BLOCK
        self.stream_length = self.axis_length // self.streams  # L
        self.epoch_length = self.streams * self.stream_length
        self._rows = batch_size if batch_size and self.streams % batch_size == 0 else self.streams
        of_shard = np.zeros(len(self.sequences), np.uint16) if species is None else np.array(species, np.uint16)
        ends = np.cumsum(np.bincount(of_shard))
        self._members = np.split(np.argsort(of_shard, kind="stable"), ends[:-1])  # shards of each species
        self._draws = None if draws is None else [int(count) for count in draws]
        self._shards_key, self._species_key, self._windows_key = (
            np.array([root_key(seed, purpose)]) for purpose in (PURPOSE_SHARDS, PURPOSE_SPECIES, PURPOSE_WINDOWS)
        )
        self._axis = lru_cache(maxsize=2)(self._lay)  # a batch may touch the end of one epoch and the beginning of the next

    def fingerprint(self) -> str:
        """Stands for everything but the dataset and the seed that the order depends on."""
        parts = [VERSION, self.streams, self._rows, self.window, self._draws]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def places(self, positions: Ints) -> tuple[Ints, Ints]:
        """Where sequences are.

        Args:
            positions: int64 [n], >= 0.

        Returns:
            (row of shards.npy, sequence of that shard), each int64 [n].
        """
        epochs, within = np.divmod(positions, self.epoch_length)
        turns, slots = np.divmod(within, self.streams)
        batches, batch_rows = np.divmod(slots, self._rows)
        streams = batch_rows * (self.streams // self._rows) + batches
        in_order = streams * self.stream_length + self._walk(epochs, streams, turns)
        rows, inside = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            axis, here = self._axis(int(epoch)), epochs == epoch
            on_axis = in_order[here] + axis.rotation
            on_axis -= self.axis_length * (on_axis >= self.axis_length)
            piece = np.searchsorted(axis.starts, on_axis, side="right") - 1
            rows[here] = axis.rows[piece]
            inside[here] = on_axis - axis.starts[piece] + axis.first[piece]
        return rows, inside

    def _walk(self, epochs: Ints, streams: Ints, turns: Ints) -> Ints:
        """Which sequence of its stream comes at a turn."""
        phase = (streams * _GOLDEN_32 & 0xFFFFFFFF) * self.window >> 32
        if self.stream_length <= self.window:  # the whole stream is one window: nothing to stagger
            phase[:] = 0
        windows = (turns + phase) // self.window
        start = np.maximum(windows * self.window - phase, 0)
        end = np.minimum((windows + 1) * self.window - phase, self.stream_length)
        keys = fork(fork(self._windows_key, epochs), (streams << 32) + windows)
        return start + permuted(keys, end - start, turns - start)

    def _lay(self, epoch: int) -> Axis:
        key = fork(self._shards_key, epoch)
        shards_key, species_key, rotation_key = (fork(key, number) for number in range(3))
        parts = []
        for species in shuffled(species_key, len(self._members))[0].tolist():
            pieces = self._pieces(epoch, species)
            mixed = shuffled(fork(shards_key, species), len(pieces[0]))[0]
            parts.append([column[mixed] for column in pieces])
        rows, first, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return Axis(rows, first, np.cumsum(counts) - counts, int(uniform(rotation_key)[0] * self.axis_length))

    def _pieces(self, epoch: int, species: int) -> tuple[Ints, Ints, Ints]:
        """What a species gives to an epoch: rows of shards, first sequence and number of sequences of each piece."""
        members = self._members[species]
        sizes = self.sequences[members]
        if self._draws is None:
            return members, np.zeros_like(members), sizes
        count, whole = self._draws[species], max(1, int(sizes.sum()))
        begin, end = epoch * count, (epoch + 1) * count  # on the axis of all passes over the species
        passes = np.arange(begin // whole, -(-end // whole))
        order = shuffled(fork(fork(self._species_key, species), passes), len(members)).reshape(-1)
        ends = np.cumsum(sizes[order]) + begin // whole * whole
        starts = ends - sizes[order]
        first, last = np.maximum(begin - starts, 0), np.minimum(end - starts, sizes[order])
        some = last > first
        return members[order[some]], first[some], (last - first)[some]


def shuffled(keys: Ints, count: int) -> Ints:
    """A permutation of 0 .. count - 1 for each key: int64 [keys, count]; the same on every machine."""
    bits = count.bit_length()
    words = np.empty((len(keys), count), np.int64)
    for start in range(0, count, 16384):  # as much as stays in a processor's cache: three times as fast
        numbers = np.arange(start, min(start + 16384, count))
        # The number stands in the lowest bits, so that sorting the words themselves, which is faster than argsort, orders
        # the numbers, and no two words are equal.
        words[:, numbers] = fork(keys[:, None], numbers) & ~((1 << bits) - 1) | numbers
    words.sort(axis=-1)
    words &= (1 << bits) - 1
    return words


def permuted(keys: Ints, lengths: Ints, index: Ints) -> Ints:
    """Where a keyed permutation of 0 .. length - 1 sends `index`, element by element, without building the permutation.

    A Feistel network that adds, on pairs of numbers below a and b with a * b just above the length, walked until it lands
    inside (the generalised Feistel cipher of Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
        keys, lengths, index: int64 [n]; 0 <= index < length, lengths below 2^31.

    Returns:
        int64 [n].
    """
    lows = np.ceil(np.sqrt(lengths)).astype(np.int64)
    highs = -(-lengths // lows)
    high, low = np.divmod(index, lows)
    for number in range(0, ROUNDS, 2):
        high = _add(high, fork(keys, low * ROUNDS + number), highs)
        low = _add(low, fork(keys, high * ROUNDS + number + 1), lows)
    result: Ints = high * lows + low
    outside = np.flatnonzero(result >= lengths)
    if len(outside):
        result[outside] = permuted(keys[outside], lengths[outside], result[outside])
    return result


def _add(numbers: Ints, words: Ints, size: Ints) -> Ints:
    """(number + a random one below `size`) modulo `size`."""
    numbers = numbers + ((words & 0x7FFFFFFF) * size >> 31)
    numbers -= size * (numbers >= size)
    return numbers


def streams_in_use(streams: int, batch_size: int, sequences: int) -> int:
    """How many streams a run with this batch size uses of a dataset with `streams` and `sequences`.

    The largest multiple of the batch size up to `streams`, or the batch size itself where it is larger: so each row of a
    batch has streams of its own. (An epoch leaves out fewer sequences than there are streams in use.) Only where that would
    cut a small dataset into streams of under 8 sequences, the dataset's number is taken; ranks then read blocks more than
    once, which a small dataset can bear.
    """
    if batch_size <= streams:
        return batch_size * (streams // batch_size)
    return batch_size if sequences >= LEAST_STREAM * batch_size else streams


def rank_rows(batch_size: int, rank: int, ranks: int) -> range:
    """The rows of a global batch that a rank takes: any number of ranks, sizes that differ by at most one."""
    return range(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)


def micro_batches(batch_size: int, ranks: int, micro_batch_size: int) -> int:
    """Micro batches a step, the same on every rank: as many as the rank with the most rows needs."""
    most = -(-batch_size // ranks)
    return -(-most // micro_batch_size)
