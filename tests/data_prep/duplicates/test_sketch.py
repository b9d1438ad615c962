"""Sketches against a plain reading of the text, on both strands and in every phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.duplicates import sketch
from data_prep.duplicates.sketch import DENSITY, ROW_BITS, WORD, Sketcher, hashes_path, sequences_path
from data_prep.kmers import reverse_complement
from tests.data_prep.conftest import random_bases


def written(sketcher: Sketcher, directory: Path, unit: int = 0) -> tuple[np.ndarray, list[set[int]]]:
    """The table of sequences, and the set of hashes of each."""
    sketcher.write(directory, unit)
    rows, keys = np.load(sequences_path(directory, unit)), np.load(hashes_path(directory, unit))
    assert (keys[1:] > keys[:-1]).all()
    sets: list[set[int]] = [set() for _ in rows]
    for key in keys.tolist():
        sets[key % (1 << ROW_BITS)].add(key >> ROW_BITS)
    assert rows["hashes"].tolist() == [len(each) for each in sets]
    return rows, sets


def sketch_of(directory: Path, text: bytes, cuts: list[int], seed: int = 0) -> tuple[np.ndarray, list[set[int]]]:
    """Of a piece that is cut at `cuts`."""
    sketcher, starts = Sketcher(seed), np.array([0, *cuts])
    sketcher.add(0, 0, text, starts, np.diff(starts, append=len(text)))
    return written(sketcher, directory)


def test_strand_and_phase_do_not_matter(tmp_path: Path) -> None:
    text = random_bases(1, 300_000)  # longer than what is hashed at a time
    rows, (whole,) = sketch_of(tmp_path, text, [])
    assert 0.9 < len(whole) / len(text) / DENSITY < 1.1
    back, (reverse,) = sketch_of(tmp_path, reverse_complement(text), [])
    assert reverse == whole and back["exact"] == rows["exact"] and back["bases"] == len(text)
    for cuts in ([7, 131_000, 131_100], list(range(600, 300_000, 600)), list(range(10, 300_000, 17_000))):
        rows, parts = sketch_of(tmp_path, text, cuts)
        assert set().union(*parts) == whole
        assert len(np.unique(rows["exact"])) == len(cuts) + 1
    assert len(sketch_of(tmp_path, text, [], seed=-1)[1][0] & whole) < len(whole) / 4


def test_a_word_belongs_to_the_sequence_it_starts_in_and_lies_in_sequences(tmp_path: Path) -> None:
    text = random_bases(2, 2000)
    words = Sketcher(0)
    for start in range(len(text) - WORD + 1):
        words.add(0, start, text[start : start + WORD], np.array([0]), np.array([WORD]))
    alone = written(words, tmp_path)[1]  # of each word as a piece of its own
    # Touching, shorter than a word, overlapping (as of overlapping k-mers), after a gap; the text's end lies in none.
    spans = [(0, 600), (600, 610), (610, 900), (895, 1300), (1500, 1530), (1540, 1900)]
    starts, ends = np.array(spans).T
    sketcher = Sketcher(0)
    sketcher.add(0, 0, text, starts, ends - starts)
    sketcher.add(0, len(spans), text[600:610], np.array([0]), np.array([10]))  # the next piece touches nothing
    rows, sets = written(sketcher, tmp_path)
    expected: list[set[int]] = [set() for _ in [*spans, None]]
    for start, found in enumerate(alone):
        of = [number for number, (first, end) in enumerate(spans) if first <= start < end]
        until = next(gap for gap in (1300, 1530, 1900, 2000) if start < gap)  # where the next gap begins
        if of and start + WORD <= until:
            expected[of[-1]] |= found
    assert sets == expected and sum(map(len, sets)) > 80
    assert rows["exact"][1] == rows["exact"][-1] and len(np.unique(rows["exact"])) == len(spans)
    assert rows["number"].tolist() == list(range(len(spans) + 1))
    assert rows["bases"].tolist() == [*(ends - starts), 10]


def test_validation_comes_first_and_equal_calls_give_equal_bytes(tmp_path: Path) -> None:
    texts = [random_bases(seed, 3000) for seed in range(6)]
    starts, lengths = np.arange(0, 3000, 600), np.full(5, 600)
    for directory in ("a", "b"):
        sketcher = Sketcher(3)
        for number, text in enumerate(texts):
            sketcher.add(number % 2, number // 2 * 7, text, starts, lengths)  # numbers may have gaps
        rows, sets = written(sketcher, tmp_path / directory, 12)
    assert rows["split"].tolist() == [1] * 15 + [0] * 15
    assert rows["number"].tolist() == [first + each for first in (0, 7, 14) for each in range(5)] * 2
    for split in range(2):
        of_split = [texts[number] for number in range(6) if number % 2 == split]
        union = set().union(*(sketch_of(tmp_path, text, [], 3)[1][0] for text in of_split))
        assert set().union(*sets[15 * (1 - split) :][:15]) == union
    names = ["unit-000012.hashes.npy", "unit-000012.sequences.npy"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_to_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sets = written(Sketcher(0), tmp_path)
    assert len(rows) == len(sets) == 0
    only_texts = Sketcher(0, near=False)
    only_texts.add(1, 5, random_bases(0, 900), np.array([0]), np.array([900]))
    only_texts.add(1, 6, b"", np.empty(0, np.int64), np.empty(0, np.int64))  # all of it was a short tail
    rows, sets = written(only_texts, tmp_path)
    assert sets == [set()] and rows["number"] == [5]
    monkeypatch.setattr(sketch, "ROW_BITS", 3)
    many = Sketcher(0)
    many.add(0, 0, random_bases(0, 900), np.arange(0, 900, 100), np.full(9, 100))
    with pytest.raises(InputError, match=r"unit 4 has 9 sequences.*--unit-bases"):
        many.write(tmp_path, 4)
