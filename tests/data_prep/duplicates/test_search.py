"""The search against its definition read plainly, however it is cut; and planted repeats."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import InputError
from data_prep.dataset import SPLITS
from data_prep.duplicates.search import BASES_A_HASH, EXACT, NEAR, VOTES, Duplicates, find_duplicates, prepare
from data_prep.duplicates.sketch import HASH_BITS, ROW_BITS, SEQUENCE_ROW, VALID, Sketcher, hashes_path, sequences_path
from data_prep.kmers import reverse_complement
from tests.data_prep.conftest import random_bases

TRAIN = SPLITS.index("train")


class Sequence(NamedTuple):
    unit: int
    split: int
    number: int
    exact: int
    hashes: frozenset[int]
    bases: int


def write_units(work: Path, sequences: list[Sequence], units: int) -> None:
    for unit in range(units):
        mine = sorted((each for each in sequences if each.unit == unit), key=lambda each: (each.split != VALID, each.number))
        rows = [(each.split, each.number, each.bases, len(each.hashes), each.exact) for each in mine]
        np.save(sequences_path(work, unit), np.array(rows, dtype=SEQUENCE_ROW))
        keys = sorted((value << ROW_BITS) + row for row, each in enumerate(mine) for value in each.hashes)
        np.save(hashes_path(work, unit), np.array(keys, dtype=np.uint64))


def plain_greedy(sequences: list[Sequence], containment: float) -> list[tuple[int, ...]]:
    """The definition, one sequence after the other. (unit, split, number, reason, kept unit), sorted."""
    order = sorted(sequences, key=lambda each: (each.split != VALID, each.unit, each.number))
    texts: dict[int, Sequence] = {}
    homes: dict[Sequence, int] = {}  # where what was dropped was kept
    known: dict[int, int] = {}  # unit in which a hash was kept first
    found = []
    for each in order:
        if each.exact in texts:
            first = texts[each.exact]
            found.append((*each[:3], EXACT, homes.get(first, first.unit)))
            continue
        texts[each.exact] = each
        shared = sorted(each.hashes & known.keys())
        judged = each.hashes and each.bases <= len(each.hashes) * BASES_A_HASH
        if judged and len(shared) * 1000 >= round(containment * 1000) * len(each.hashes):
            votes = Counter(known[value] for value in shared[:VOTES])
            homes[each] = min(votes, key=lambda unit: (-votes[unit], unit))
            found.append((*each[:3], NEAR, homes[each]))
        else:
            for value in each.hashes:
                known.setdefault(value, each.unit)
    return sorted(found)


def rows_of(found: Duplicates) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in astuple(found)), strict=True))


def made_up(rng: np.random.Generator, count: int, units: int, pool: int) -> list[Sequence]:
    """Sequences that are new, or copies, pieces and mixtures of earlier ones, so that chains of containment come up."""
    values = rng.integers(0, 1 << HASH_BITS, pool).tolist()
    sequences, numbers = list[Sequence](), Counter[tuple[int, int]]()
    for each in range(count):
        size = int(rng.integers(0, 12))
        hashes = set(rng.choice(values, size).tolist())
        exact = each
        if sequences and rng.random() < 0.7:
            old, other = (sequences[int(place)] for place in rng.integers(0, len(sequences), 2))
            mixed = sorted(old.hashes | other.hashes)
            kind = int(rng.integers(0, 4))
            hashes = set(old.hashes) if kind < 2 else {value for value in mixed if rng.random() < 0.8}
            if kind == 0:
                exact = old.exact
            elif kind == 1:  # one hash is another
                hashes = set(sorted(hashes)[1:]) | {int(rng.choice(values))}
        place = int(rng.integers(0, units)), int(rng.random() < 0.2)
        numbers[place] += int(rng.integers(1, 3))
        bases = int(rng.choice([60, 300, 5000], p=[0.5, 0.4, 0.1]))
        sequences.append(Sequence(*place, numbers[place], exact, frozenset(hashes), bases))
    return sequences


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 20, 60]), st.integers(1, 5), st.sampled_from([0.5, 0.8, 1.0]))
def test_it_is_the_greedy_search_whatever_the_partitions(seed: int, count: int, units: int, containment: float) -> None:
    sequences = made_up(np.random.default_rng(seed), count, units, pool=count)
    expected = plain_greedy(sequences, containment)
    for partition_bytes in (200, 1 << 20):  # rounds, of which the last holds two dozen hashes; everything at once
        with tempfile.TemporaryDirectory() as name:
            write_units(Path(name), sequences, units)
            options = {"containment": containment, "partition_bytes": partition_bytes}
            assert rows_of(find_duplicates(Path(name), range(units), near=True, **options)) == expected  # type: ignore[arg-type]
            exact = find_duplicates(Path(name), range(units), near=False, partition_bytes=partition_bytes)
            assert [row[:3] for row in rows_of(exact)] == [row[:3] for row in expected if row[3] == EXACT]


def test_what_only_dropped_sequences_have_does_not_count(tmp_path: Path) -> None:
    """Each link of a chain has 8 of 10 hashes of the one before: every other one falls, not all but the first."""
    chain = [Sequence(0, TRAIN, each, each, frozenset(range(2 * each, 2 * each + 10)), 60) for each in range(9)]
    write_units(tmp_path, chain, 1)
    for partition_bytes in (80, 1 << 20):
        found = find_duplicates(tmp_path, [0], near=True, partition_bytes=partition_bytes)
        assert found.number.tolist() == [1, 3, 5, 7]


def test_tasks_and_a_kill_in_the_middle_change_nothing(tmp_path: Path) -> None:
    sequences = made_up(np.random.default_rng(5), 2000, 6, pool=2000)
    write_units(tmp_path, sequences, 6)
    expected = plain_greedy(sequences, 0.8)
    script = """
import sys, time
from pathlib import Path
from data_prep.duplicates import search as duplicates, partitions
whole = partitions.Sketches.prepare
def slowly(self, partition):
    whole(self, partition)
    print(partition, flush=True)
    time.sleep(0.02)
partitions.Sketches.prepare = slowly
duplicates.prepare(Path(sys.argv[1]), range(6), 2, 1, partition_bytes=2000)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = tmp_path / "duplicates"
    done = {path: path.read_bytes() for path in folder.glob("part-*")}
    assert 3 <= len(done) < 32
    prepare(tmp_path, range(6), 2, 1, partition_bytes=2000)
    prepare(tmp_path, range(6), 2, 1, partition_bytes=2000)
    assert all(path.read_bytes() == data for path, data in done.items())
    times = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    time.sleep(0.01)
    assert rows_of(find_duplicates(tmp_path, range(6), near=True, partition_bytes=2000)) == expected
    assert all(path.stat().st_mtime_ns == was for path, was in times.items())  # what a task did is not done again
    assert 2 * len(times) == len(list(folder.glob("part-*")))


def test_sketches_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    write_units(tmp_path, made_up(np.random.default_rng(0), 20, 2, 20), 2)
    for path in (hashes_path(tmp_path, 1), sequences_path(tmp_path, 0)):
        whole = path.read_bytes()
        for damage, said in ((whole[: len(whole) // 2], "damaged"), (b"", "damaged"), (None, "missing")):
            path.write_bytes(damage) if damage is not None else path.unlink()
            with pytest.raises(InputError, match=f"{path.name}: {said}"):
                find_duplicates(tmp_path, [0, 1], near=True)
        path.write_bytes(whole)
    np.save(hashes_path(tmp_path, 1), np.zeros(3))
    with pytest.raises(InputError, match="not of this version"):
        prepare(tmp_path, [0, 1], 1, 0)
    assert rows_of(find_duplicates(tmp_path, [], near=True)) == rows_of(Duplicates.none()) == []


def add(sketcher: Sketcher, text: bytes, first_number: int = 0, split: int = TRAIN, phase: int = 0) -> int:
    """Add a piece in windows of 600 bases, the first of `phase`; return the number of the next sequence."""
    starts = np.unique([0, *range(phase, len(text), 600)])
    sketcher.add(split, first_number, text, starts, np.diff(starts, append=len(text)))
    return first_number + len(starts)


def test_training_loses_to_validation_and_later_units_to_earlier_ones(tmp_path: Path) -> None:
    texts = [random_bases(seed, 6000) for seed in range(3)]
    for unit, pieces in enumerate(
        ([(0, TRAIN), (1, TRAIN)], [(1, VALID), (2, TRAIN)], [(0, TRAIN), (1, VALID), (2, VALID)])
    ):
        sketcher, numbers = Sketcher(0), [0, 0]
        for seed, split in pieces:
            text = reverse_complement(texts[seed]) if unit == 2 else texts[seed]
            numbers[split] = add(sketcher, text, numbers[split], split, phase=150 * unit)
        sketcher.write(tmp_path, unit)
    found = find_duplicates(tmp_path, range(3), near=True)
    lost = Counter(zip(found.unit.tolist(), found.split.tolist(), found.kept_unit.tolist(), strict=True))
    # Text 1 stands in three places, and validation of the first unit with it keeps it; text 2 in validation of unit 2.
    assert lost == {(0, TRAIN, 1): 10, (1, TRAIN, 2): 11, (2, TRAIN, 0): 11, (2, VALID, 1): 11}


def mutated(rng: np.random.Generator, text: bytes, rate: float) -> bytes:
    bases = np.frombuffer(text, np.uint8).copy()
    places = np.flatnonzero(rng.random(len(bases)) < rate)
    letters = np.frombuffer(b"ACGT", np.uint8)
    codes = np.searchsorted(letters, bases[places])
    bases[places] = letters[(codes + rng.integers(1, 4, len(places))) % 4]
    return bases.tobytes()


def planted(work: Path, seed: int = 0, size: int = 60_000) -> dict[str, tuple[float, float]]:
    """Shares of the sequences of each kind that are dropped, exact and near: 2 Mb with repeats of `size` bases planted."""
    rng, genome = np.random.default_rng(seed), random_bases(seed, 1_200_000)
    source = iter(genome[start : start + size] for start in range(0, len(genome), size))
    words = [random_bases(100 * seed + each, 40) for each in range(100)]
    pieces = {
        "the genome": genome,
        "copies": next(source),
        "copies, reverse complement": reverse_complement(next(source)),
        "copies, other phase": random_bases(seed + 40, 250) + next(source),  # the window on the edge is three fifths new
        "copies, 0.3 % different": mutated(rng, next(source), 0.003),
        "copies, 1 % different": mutated(rng, next(source), 0.01),
        "copies, 3 % different": mutated(rng, next(source), 0.03),
        "copies, 10 % different": mutated(rng, next(source), 0.1),
        "half of each copied": b"".join(
            new[at : at + 300] + old[at + 300 : at + 600]
            for new, old in [(random_bases(seed + 50, size), next(source))]
            for at in range(0, size, 600)
        ),
        "new": random_bases(seed + 60, 300_000),
        "repeats of 1 to 5 bases": b"".join((word[: place % 5 + 1] * 600)[:600] for place, word in enumerate(words)),
        "repeats of 40 bases": b"".join((word * 15)[:600] for word in words),
        "the same in other phase": b"".join((word * 16)[7:607] for word in words),
    }
    sketcher, counts, number = Sketcher(seed), dict[str, tuple[int, int]](), 0
    for name, text in pieces.items():
        first, number = number, add(sketcher, text, number)
        counts[name] = first, number
    sketcher.write(work, 0)
    found, dropped = find_duplicates(work, [0], near=True), dict[str, tuple[float, float]]()
    for name, (first, end) in counts.items():
        reasons = found.reason[(found.number >= first) & (found.number < end)]
        exact, near = (float(np.count_nonzero(reasons == reason) / (end - first)) for reason in (EXACT, NEAR))
        dropped[name] = exact, near
    return dropped


def test_planted_repeats(tmp_path: Path) -> None:
    dropped = planted(tmp_path)
    for name in ("the genome", "new", "half of each copied", "copies, 10 % different", "repeats of 40 bases"):
        assert dropped[name] == (0, 0), name
    assert dropped["copies"] == dropped["copies, reverse complement"] == (1, 0)
    assert dropped["copies, other phase"] == (0, 100 / 101)  # all but the one on the edge
    assert sum(dropped["copies, 0.3 % different"]) > 0.9
    assert 0.2 < dropped["copies, 1 % different"][1] < 0.7  # 0.99 ** 24 = 0.79 of the 24-mers are in both
    assert dropped["copies, 3 % different"][1] < 0.03
    assert dropped["repeats of 1 to 5 bases"][1] == 0  # too few k-mers to judge by: only equal ones go
