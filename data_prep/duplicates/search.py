"""Which sequences of a dataset in the making are duplicates, from their sketches (sketch.py, partitions.py).

Exact: the text of a sequence, or its reverse complement, is that of one before it. Near: at least CONTAINMENT of its sketch
lies in the sequences kept before it, taken together. That is not the likeness of two sequences: windows of two copies share
no phase, so a window's text is spread over two windows of the other copy, and no pair is alike. What a dropped sequence
alone contains does not count, or a chain of copies, each a little further from the first, would leave nothing but the first.
Exact duplicates take no part in the search for near ones.

The definition is sequential. The search is not: a sequence that shares too little with all before it is surely kept, one
that shares enough with those surely kept is surely dropped, and either decides others. Each round of this goes through
the hashes that are shared, a partition at a time; the second leaves few open, and once their sketches fit in memory they are
decided one after the other. Whatever the partitions, the result is that of the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import log, progress
from data_prep.duplicates.partitions import PARTITION_BYTES, Sketches

CONTAINMENT = 0.8
BASES_A_HASH = 64  # at most, five times the usual, to judge a sequence by its sketch: repeats of short words have more
EXACT, NEAR = 1, 2  # reasons
KEPT, OPEN, EXCLUDED = 0, 3, 4  # other states of a sequence
VOTES = 8  # hashes of a near-duplicate that decide where it was kept


@dataclass(frozen=True)
class Duplicates:
    """Sequences to drop, by unit, split and number. [duplicates]"""

    unit: NDArray[np.uint32]
    split: NDArray[np.uint8]  # index in SPLITS
    number: NDArray[np.uint32]  # in the shard
    reason: NDArray[np.uint8]  # EXACT or NEAR
    kept_unit: NDArray[np.uint32]  # where the text was kept; for NEAR, the unit that most of its hashes were first kept in

    @classmethod
    def none(cls) -> Duplicates:
        """Of a dataset that keeps its duplicates."""
        numbers, small = np.empty(0, np.uint32), np.empty(0, np.uint8)
        return cls(numbers, small, numbers, small, numbers)


def prepare(work: Path, units: Sequence[int], num_tasks: int, task: int, *, partition_bytes: int = PARTITION_BYTES) -> None:
    """Do one task's share of the sorting that the search for near-duplicates begins with; what is done stays done.

    All units must have been sketched. The tasks of an array need nothing from each other.
    """
    sketches = Sketches(work, units, partition_bytes)
    mine = range(task, sketches.partitions, num_tasks)
    for partition in progress(mine, total=len(mine), unit="partitions of sketches sorted"):
        sketches.prepare(partition)


def find_duplicates(
    work: Path,
    units: Sequence[int],
    *,
    near: bool,
    excluded: NDArray[np.void] | None = None,
    containment: float = CONTAINMENT,
    partition_bytes: int = PARTITION_BYTES,
) -> Duplicates:
    """The duplicates among all sequences of `units`, which are sketched in `work`.

    Args:
        near: also near-duplicates, not only exact ones.
        excluded: sequences that are not kept whatever this finds, and so make no other a duplicate. [excluded] of SEQUENCE
        containment: share of a sequence's sketch that makes it a near-duplicate; above 0.
        partition_bytes: of sketches held in memory at a time. The result does not depend on it.
    """
    sketches = Sketches(work, units, partition_bytes)
    state = np.zeros(sketches.sequences, dtype=np.uint8)
    if excluded is not None:
        state[sketches.marked(excluded)] = EXCLUDED
    exact, original = _exact(sketches.column("exact"), state == KEPT, sketches.partitions)
    state[exact] = EXACT
    dropped, kept = [exact], [sketches.unit_of(original)]
    if near:
        _decide(sketches, state, containment, partition_bytes // 8)
        ranks = np.flatnonzero(state == NEAR)
        homes = _homes(sketches, state, ranks)
        dropped.append(ranks)
        kept.append(homes)
        gone = state[original] == NEAR  # what an exact duplicate repeats was itself dropped
        kept[0][gone] = homes[np.searchsorted(ranks, original[gone])]
    return _table(sketches, state, np.concatenate(dropped), np.concatenate(kept))


def _exact(
    hashes: NDArray[np.uint64], wanted: NDArray[np.bool_], partitions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks of `wanted` sequences whose hash one before them has, and the lowest rank that has it. Both [sequences]"""
    again, first = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for partition in range(partitions):
        low, high = ((bound << 64) // partitions for bound in (partition, partition + 1))
        ranks = np.flatnonzero((hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1)) & wanted)
        ranks = ranks[np.argsort(hashes[ranks], kind="stable")]
        group = _group(hashes[ranks])
        lowest = ranks[_first(group)[group]]  # the first of each group
        again.append(ranks[ranks != lowest])
        first.append(lowest[ranks != lowest])
    return np.concatenate(again), np.concatenate(first)


def _decide(sketches: Sketches, state: NDArray[np.uint8], containment: float, memory: int) -> None:
    """Set every `state` [sequences] that is KEPT to KEPT or NEAR; `memory` hashes may be held."""
    size = sketches.column("hashes")
    need = np.ceil(size * np.float32(containment) - np.float32(1e-4)).astype(np.uint32)  # 0.8 * 5 is 4, however rounded
    state[(state == KEPT) & (size > 0) & (sketches.column("bases") <= size * np.uint32(BASES_A_HASH))] = OPEN
    del size
    while (state == OPEN).any():
        certain, possible = np.zeros((2, len(state)), dtype=np.uint32)  # hashes in kept ones before it; and in open ones
        for partition in progress(range(sketches.partitions), total=sketches.partitions, unit="partitions compared"):
            _, rank, kept_before, open_before = _support(sketches, partition, state)
            np.add.at(certain, rank[kept_before], np.uint32(1))
            np.add.at(possible, rank[kept_before | open_before], np.uint32(1))
        still = state == OPEN
        state[still & (possible < need)] = KEPT
        state[still & (certain >= need)] = NEAR
        still = state == OPEN
        log(f"near-duplicates: {np.count_nonzero(still):,} of {len(state):,} sequences left to decide")
        if need[still].sum(dtype=np.int64) <= memory * containment:  # about all hashes of those sequences
            _decide_in_order(sketches, state, need)


def _decide_in_order(sketches: Sketches, state: NDArray[np.uint8], need: NDArray[np.uint32]) -> None:
    """Decide what is OPEN as the definition says. `state` and `need` [sequences]."""
    still = np.flatnonzero(state == OPEN)
    found = np.zeros(len(still), dtype=np.int64)  # hashes of each in kept sequences before it
    parts, groups = [np.empty((2, 0), dtype=np.int64)], 0
    for partition in range(sketches.partitions if len(still) else 0):
        group, rank, kept_before, _ = _support(sketches, partition, state)
        mine = state[rank] == OPEN
        found += np.bincount(np.searchsorted(still, rank[mine & kept_before]), minlength=len(still))
        parts.append(np.stack([rank, group + groups])[:, mine & ~kept_before])
        groups += int(group[-1]) + 1 if len(group) else 0
    rank, group = np.concatenate(parts, axis=1)
    group = np.unique(group, return_inverse=True)[1]
    known = np.zeros(len(group), dtype=bool)  # is this hash in a sequence that was kept meanwhile?
    group, rank = group[order := np.argsort(rank, kind="stable")], rank[order]
    bounds = np.searchsorted(rank, np.append(still, len(state))).tolist()
    for place, each in enumerate(still.tolist()):
        mine = group[bounds[place] : bounds[place + 1]]
        if found[place] + np.count_nonzero(known[mine]) >= need[each]:
            state[each] = NEAR
        else:
            state[each] = KEPT
            known[mine] = True


def _support(
    sketches: Sketches, partition: int, state: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """The shared hashes of a partition in sequences that are kept or open.

    Returns, each [pairs of hash and sequence], sorted by hash and rank: number of the hash, rank of the sequence, whether
    one before it that has the hash is kept, and whether one is open.
    """
    group, rank = _pairs(sketches, partition, (state == KEPT) | (state == OPEN))
    kept = state[rank] == KEPT
    return group, rank, _before(group, kept), _before(group, ~kept)


def _pairs(sketches: Sketches, partition: int, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the hash and rank of the shared hashes of `wanted` [sequences], sorted by both."""
    hashes, rank = sketches.shared(partition)
    mine = wanted[rank]
    hashes, rank = hashes[mine], rank[mine]
    return _group(hashes), rank


def _group(values: NDArray) -> NDArray[np.int64]:
    """Number of the group of equal ones that each value is in. `values` [places], sorted."""
    return np.cumsum(np.append(False, values[1:] != values[:-1])[: len(values)])


def _first(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of the first of each group. `group` as `_group` returns it."""
    return np.flatnonzero(np.diff(group, prepend=-1))


def _before(group: NDArray[np.int64], flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a flag stands before each place in its group. Both [places], `group` ascending."""
    count: NDArray[np.int64] = np.cumsum(flags) - flags  # of those before
    return count > count[_first(group)[group]]


def _homes(sketches: Sketches, state: NDArray[np.uint8], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of the unit where most of each near-duplicate was kept first. `ranks` of the near-duplicates, ascending.

    Judged by the lowest VOTES of its hashes that are kept, a random sample; of equal ones the first unit. [len(ranks)]
    """
    nobody = len(sketches.units)
    votes, cast = np.full((len(ranks), VOTES), nobody, dtype=np.int32), np.zeros(len(ranks), dtype=np.int64)
    for partition in range(sketches.partitions if len(ranks) else 0):
        group, rank = _pairs(sketches, partition, (state == KEPT) | (state == NEAR))
        kept = state[rank] == KEPT
        home = np.full(int(group[-1]) + 1 if len(group) else 0, -1, dtype=np.int64)  # of each hash: the first kept
        home[group[kept][::-1]] = rank[kept][::-1]
        voting = _before(group, kept) & ~kept
        mine, home = np.searchsorted(ranks, rank[voting]), home[group[voting]]
        order = np.argsort(mine, kind="stable")  # by sequence, then hash
        mine, home = mine[order], home[order]
        turn = np.arange(len(mine)) - np.searchsorted(mine, mine) + cast[mine]
        votes[mine[turn < VOTES], turn[turn < VOTES]] = sketches.unit_of(home[turn < VOTES])
        cast += np.bincount(mine, minlength=len(ranks))
    votes.sort(axis=1)
    best, most = np.full(len(ranks), nobody, dtype=np.int64), np.zeros(len(ranks), dtype=np.int64)
    for column in range(VOTES):
        same = (votes == votes[:, column : column + 1]).sum(axis=1)
        better = (votes[:, column] < nobody) & (same > most)
        best[better], most[better] = votes[better, column], same[better]
    return best


def _table(sketches: Sketches, state: NDArray[np.uint8], ranks: NDArray[np.int64], kept: NDArray[np.int64]) -> Duplicates:
    """The result for the sequences of these ranks, which were kept in units[kept]."""
    if not len(ranks):
        return Duplicates.none()
    units = np.array(sketches.units, dtype=np.uint32)
    split, number, unit = sketches.column("split")[ranks], sketches.column("number")[ranks], units[sketches.unit_of(ranks)]
    order = np.lexsort((number, split, unit))
    ranks, kept = ranks[order], kept[order]
    return Duplicates(unit[order], split[order], number[order], state[ranks], units[kept])
