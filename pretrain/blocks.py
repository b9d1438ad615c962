"""Blocks of a split in memory: read once, by several threads, kept while the streams that need them are open."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from data_prep.cli import InputError, log
from data_prep.dataset import SEQUENCES_PER_BLOCK, Split
from data_prep.storage import DamagedBlock

Item = TypeVar("Item")
_SHIFT = 20  # a block's number within its shard takes the lower bits of its id; shards have far fewer than a million blocks


class BlockPool:
    """Sequences by (shard row, sequence of the shard), out of a fixed number of slots for blocks; oldest use goes first.

    A slot holds a block's tokens as they are stored, and where each sequence starts; any selection of sequences is one
    gather of rows of equal width, which run on into the next sequence. Used by one thread at a time.

    Args:
        split: what is read.
        width: content tokens of the longest sequence.
        capacity: slots of `slot_bytes(width)` each, which the system gives as they are filled.
        threads: blocks that are read at once.
        skip_damaged: leave the sequences of damaged blocks out instead of raising DamagedBlock.
    """

    def __init__(self, split: Split, width: int, capacity: int, threads: int = 1, skip_damaged: bool = False) -> None:
        self.split, self.width, self.skip_damaged = split, width, skip_damaged
        self.blocks_read = 0
        self._slot_size = SEQUENCES_PER_BLOCK * width
        self._tokens = np.empty(capacity * self._slot_size + width, np.uint16)
        self._rows = sliding_window_view(self._tokens, width)  # row i: the tokens i to i + width - 1
        self._starts, self._lengths = np.zeros((2, capacity, SEQUENCES_PER_BLOCK), np.int64)
        self._last_use = np.zeros(capacity, np.int64)
        self._ids = np.zeros(0, np.int64)  # of the blocks in memory, sorted,
        self._slots = np.zeros(0, np.int64)  # and where each is
        self._clock, self._filled = 0, 0
        self._readers = Readers(threads)
        self._in_flight: dict[int, tuple[int, int, float]] = {}  # thread -> (row, block, since)

    def read(self, rows: NDArray[np.int64], sequences: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Tokens of sequences.

        Args:
            rows, sequences: int64 [n].

        Returns:
            (tokens: uint16 [n, width], lengths: int64 [n]). What lies beyond a length is undefined. A length of 0 marks a
            sequence of a damaged block under `skip_damaged`.

        Raises DamagedBlock, or OSError when a block can't be read at all.
        """
        ids = (rows << _SHIFT) + sequences // SEQUENCES_PER_BLOCK
        self._clock += 1
        slots = self._find(ids)
        missing = np.unique(ids[slots < 0])
        if len(missing):
            if len(np.unique(ids)) > len(self._last_use):
                half = len(rows) // 2
                parts = [self.read(rows[part], sequences[part]) for part in (slice(half), slice(half, None))]
                return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([lengths for _, lengths in parts])
            self._last_use[slots[slots >= 0]] = self._clock
            self._fill(missing)
            slots = self._find(ids)
        self._last_use[slots] = self._clock
        inside = sequences % SEQUENCES_PER_BLOCK
        return self._rows[self._starts[slots, inside]], self._lengths[slots, inside]

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots of blocks, -1 for those that are not in memory."""
        if len(self._ids) == 0:
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._slots[at], -1)

    def _fill(self, missing: NDArray[np.int64]) -> None:
        """Read blocks, in the place of those whose last use is longest ago."""
        free = self._free(len(missing))
        self._readers.map(self._load, list(zip(missing.tolist(), free.tolist(), strict=True)))
        ids, slots = np.append(self._ids, missing), np.append(self._slots, free)
        order = np.argsort(ids)
        self._ids, self._slots = ids[order], slots[order]

    def _free(self, count: int) -> NDArray[np.int64]:
        """Slots that hold nothing in use, given up by their blocks."""
        fresh = np.arange(self._filled, min(self._filled + count, len(self._last_use)))
        self._filled += len(fresh)
        if len(fresh) == count:
            return fresh
        oldest = np.argsort(self._last_use[self._slots], kind="stable")[: count - len(fresh)]
        given_up = self._slots[oldest]
        self._ids, self._slots = np.delete(self._ids, oldest), np.delete(self._slots, oldest)
        return np.append(given_up, fresh)

    def _load(self, job: tuple[int, int]) -> None:
        """Read block `id` into `slot`."""
        (row, number), slot = divmod(job[0], 1 << _SHIFT), job[1]
        with self._reading(row, number):
            try:
                block = self.split.read_block(row, number)
            except DamagedBlock as error:
                if not self.skip_damaged:
                    raise
                log(f"skipped: {error}")
                self._starts[slot], self._lengths[slot] = 0, 0
                return
        self.blocks_read += 1
        lengths = block.lengths.astype(np.int64)
        if lengths.max(initial=0) > self.width:
            place = self.split.describe_block(row, number)
            raise InputError(
                f"{place} has a sequence of {lengths.max()} tokens, the manifest allows {self.width}; shard again"
            )
        start, count = slot * self._slot_size, len(lengths)
        self._tokens[start : start + len(block.tokens)] = block.tokens
        self._starts[slot, :count] = start + np.cumsum(lengths) - lengths
        self._lengths[slot, :count], self._lengths[slot, count:] = lengths, 0

    @contextmanager
    def _reading(self, row: int, number: int) -> Iterator[None]:
        thread = threading.get_ident()
        self._in_flight[thread] = (row, number, time.monotonic())
        try:
            yield
        finally:
            del self._in_flight[thread]

    def in_flight(self) -> str:
        """The read that has been under way for longest, for a message from another thread; reads nothing itself."""
        reads = list(self._in_flight.values())
        if not reads:
            return "no block is being read"
        row, number, since = min(reads, key=lambda read: read[2])
        # Without the block's offset, which stands in the index: that may be what can't be read.
        return f"reading block {number} of {self.split.describe_shard(row)} for {time.monotonic() - since:.0f} s"


def slot_bytes(width: int) -> int:
    """Memory of a slot: tokens, and where each sequence starts and how long it is."""
    return SEQUENCES_PER_BLOCK * (2 * width + 16)


def slots_needed(streams: int, window_blocks: int) -> int:
    """Slots with which a pool reads hardly any block twice while `streams` are open.

    A window that is not aligned with blocks touches one block more than it has, and those of the last window leave only when
    they are the oldest: one more a stream (`python -m pretrain bench-order` counts what fewer would cost).
    """
    return streams * (window_blocks + 2) + 8


class Readers:
    """Calls a function on several daemon threads. Unlike concurrent.futures' threads, which the interpreter joins when it
    ends, a read that hangs can't keep the process alive."""

    def __init__(self, threads: int) -> None:
        self._threads, self._started = threads, False
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def map(self, function: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Call `function` on each item; returns when all are done, and then raises the first error that came."""
        if self._threads == 1 or len(items) == 1:
            for item in items:
                function(item)
            return
        if not self._started:
            self._started = True
            for _ in range(self._threads):
                threading.Thread(target=self._work, name="block reader", daemon=True).start()
        done: SimpleQueue[Exception | None] = SimpleQueue()

        def job(item: Item) -> Callable[[], None]:
            def call() -> None:
                try:
                    function(item)
                    done.put(None)
                except Exception as error:
                    done.put(error)

            return call

        for item in items:
            self._jobs.put(job(item))
        errors = [error for error in (done.get() for _ in items) if error is not None]
        if errors:
            raise errors[0]

    def _work(self) -> None:
        while True:
            self._jobs.get()()
