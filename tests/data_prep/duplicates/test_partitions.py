"""The order of precedence, and what a partition holds, against a plain reading of the units' files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from data_prep.duplicates.partitions import Sketches
from data_prep.duplicates.sketch import HASH_BITS, ROW_BITS, SEQUENCE_ROW, VALID, hashes_path, sequences_path

UNITS = [3, 4, 7, 9, 10]
SIZES = [(0, 4), (0, 0), (3, 2), (2, 0), (0, 0)]  # sequences of validation and of training


@pytest.mark.parametrize(("partition_bytes", "partitions"), [(1 << 20, 1), (150, 8), (30, 32)])
def test_ranks_and_partitions(tmp_path: Path, partition_bytes: int, partitions: int) -> None:
    rng, order = np.random.default_rng(0), list[tuple[int, int, int]]()
    pool = [0, (1 << HASH_BITS) - 1, 1 << HASH_BITS - 1, *rng.integers(0, 1 << HASH_BITS, 17).tolist()]
    holders = defaultdict[int, list[tuple[int, int, int]]](list)  # of each hash
    for unit, (valid, train) in zip(UNITS, SIZES, strict=True):
        names = [(unit, VALID, 2 * each) for each in range(valid)] + [(unit, 1 - VALID, 2 * each) for each in range(train)]
        keys = []
        for row, name in enumerate(names):
            for value in rng.permutation(pool)[: 7 + row].tolist():
                holders[value].append(name)
                keys.append((value << ROW_BITS) + row)
        order += names
        np.save(sequences_path(tmp_path, unit), np.array([(*name[1:], 600, 8, 0) for name in names], dtype=SEQUENCE_ROW))
        np.save(hashes_path(tmp_path, unit), np.array(sorted(keys), dtype=np.uint64))
    order.sort(key=lambda name: (name[1] != VALID, name[0], name[2]))

    sketches = Sketches(tmp_path, UNITS, partition_bytes)
    assert (sketches.sequences, sketches.partitions) == (len(order), partitions)
    assert sketches.column("split").tolist() == [split for _, split, _ in order]
    assert sketches.column("number").tolist() == [number for _, _, number in order]
    assert sketches.unit_of(np.arange(len(order))).tolist() == [UNITS.index(unit) for unit, _, _ in order]

    found = []
    for partition in range(partitions):
        hashes, ranks = sketches.shared(partition)
        width = (1 << HASH_BITS) // partitions
        found += [(int(value) + partition * width, order[rank]) for value, rank in zip(hashes, ranks, strict=True)]
    expected = [
        (value, name)
        for value in sorted(holders)
        for name in sorted(holders[value], key=order.index)
        if len(holders[value]) > 1
    ]
    assert found == expected
