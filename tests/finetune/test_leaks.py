from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data import Rows, Task, strandless
from finetune.leaks import held_by, leaked


def rows(*sequences: str, seconds: tuple[str, ...] | None = None) -> Rows:
    count = len(sequences)
    return Rows(
        path=Path("made.csv"),
        sequences=list(sequences),
        labels=np.zeros(count, np.int64),
        lines=np.arange(2, count + 2),
        sha256="",
        seconds=None if seconds is None else list(seconds),
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("AACGT", "ACGTT"),
        ("aacgt", "ACGTT"),
        ("AACNG", "CNGTT"),
        ("AARG", "CYTT"),  # the reverse complement of an ambiguous base is another one
        ("AAB CCC", "VTT GGG"),  # a pair, each on the other strand
        ("AAB CCC", "AAB GGG"),
    ],
)
def test_both_strands_have_one_name(one, other):
    assert strandless(one) == strandless(other)


@pytest.mark.parametrize(("one", "other"), [("AACGT", "TGCAA"), ("AACGT", "TTGCA"), ("AAC GGT", "GGT AAC"), ("AAR", "AAY")])
def test_other_sequences_have_other_names(one, other):
    """Backwards alone, complemented alone, a pair the other way round."""
    assert strandless(one) != strandless(other)


def test_rows_are_found_on_either_strand_in_any_of_the_others():
    mask = held_by(rows("AACC", "GGTT", "ACCC", "AAAA"), [rows("AACC"), rows("TTTT", "CCCC")])
    assert mask.tolist() == [True, True, False, True]


def test_a_pair_leaks_only_whole():
    train = rows("AACC", "ACAC", seconds=("GGGT", "CCAA"))
    others = rows("GGTT", "AACC", seconds=("GGGT", "CCAA"))
    assert held_by(others, [train]).tolist() == [True, False]


def test_test_leaks_from_train_and_dev_and_dev_from_train():
    splits = {"train": rows("AACC", "AAAA"), "dev": rows("GGTT", "ACAC"), "test": rows("ACAC", "TTTT", "CACA")}
    found = leaked(Task("made", 2, splits))
    assert {split: mask.tolist() for split, mask in found.items()} == {"dev": [True, False], "test": [True, True, False]}
