"""Exclusion lists: the union of stretches, what they hit, and that a list holds for another dataset of the same genomes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_prep.audit.exclusions import HEADER, Stretches, merge, read_exclusions, write_exclusions
from data_prep.cli import InputError

CONTIGS = "contig\tspecies\tfile\tname\tlength\n"
# Two records of one name in a file; the second dataset has a file before, none of the last, and other contig numbers.
ONE = (
    CONTIGS
    + "0\tfly\ta/fly.fa\tX\t1000\n1\tfly\ta/fly.fa\tX\t500\n2\tfly\ta/fly.fa\tempty\t0\n3\tyeast\tb/yeast.fa\tI\t90\n"
)
OTHER = (
    CONTIGS + "0\tant\ta/ant.fa\tX\t1000\n1\tfly\ta/fly.fa\tX\t1000\n2\tfly\ta/fly.fa\tX\t500\n3\tfly\ta/fly.fa\tempty\t0\n"
)
LIST = (
    "file\trecord\tcontig\tlength\tstart\tend\tagainst\n"
    "a/fly.fa\t0\tX\t1000\t10\t80\ttf/0,tf/1\n"
    "a/fly.fa\t0\tX\t1000\t500\t550\ttf/1\n"
    "a/fly.fa\t1\tX\t500\t450\t500\ttf/0\n"
    "b/yeast.fa\t0\tI\t90\t0\t50\tEMP/H3\n"
)
NAMES = ["tf/0", "tf/1", "EMP/H3"]


def stretches(*rows: tuple[int, int, int, int]) -> Stretches:
    contig, start, end, sets = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return Stretches(contig, start, end, sets.astype(np.uint8))


FOUND = stretches((3, 0, 50, 4), (0, 500, 550, 2), (0, 30, 80, 2), (0, 10, 60, 1), (1, 450, 500, 1), (0, 20, 30, 1))


def contigs_file(folder: Path, text: str) -> Path:
    (folder / "contigs.tsv").write_text(text)
    return folder / "contigs.tsv"


def test_the_union_is_that_of_the_bases() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        start = rng.integers(0, 200, 30)
        rows = np.stack([rng.integers(5, 9, 30), start, start + rng.integers(1, 12, 30), 1 << rng.integers(0, 3, 30)], 1)
        bases: dict[tuple[int, int], int] = {}
        for contig, first, end, sets in rows.tolist():
            for base in range(first, end):
                bases[contig, base] = bases.get((contig, base), 0) | sets
        whole = merge([stretches(*rows[:11].tolist()), stretches(), stretches(*rows[11:].tolist())])
        places = list(zip(whole.contig.tolist(), whole.start.tolist(), whole.end.tolist(), strict=True))
        assert places == sorted(places)
        assert {(contig, base) for contig, a, b in places for base in range(a, b)} == set(bases)
        for (contig, a, b), sets in zip(places, whole.sets.tolist(), strict=True):
            assert (contig, a - 1) not in bases and (contig, b) not in bases
            assert sets == np.bitwise_or.reduce([bases[contig, base] for base in range(a, b)])


def test_the_bytes_of_a_list(tmp_path: Path) -> None:
    contigs, path = contigs_file(tmp_path, ONE), tmp_path / "list.tsv"
    write_exclusions(path, merge([FOUND]), contigs, NAMES)
    assert path.read_text() == LIST
    assert {each.name for each in tmp_path.iterdir()} == {"contigs.tsv", "list.tsv"}  # nothing temporary is left
    write_exclusions(path, merge([stretches()]), contigs, NAMES)
    assert path.read_text() == HEADER + "\n"
    nothing = read_exclusions(path, contigs)
    assert nothing.bases == 0 and not nothing.hit(np.array([0]), np.array([0]), np.array([1000])).any()


def test_a_list_holds_for_another_dataset_of_the_genomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "list.tsv"
    path.write_text(LIST)
    found = read_exclusions(path, contigs_file(tmp_path, OTHER))
    assert (found.files, found.unknown_files, found.bases) == (1, 1, 70 + 50 + 50)
    assert found.sha256 == hashlib.sha256(LIST.encode()).hexdigest()
    assert "1 of its 2 files are not in this dataset, such as b/yeast.fa" in capsys.readouterr().err
    cases = {
        (1, 0, 10): False,  # ends where the stretch begins
        (1, 0, 11): True,
        (1, 79, 200): True,
        (1, 80, 500): False,
        (1, 0, 1000): True,  # around stretches
        (1, 20, 20): False,  # empty
        (1, 600, 1000): False,
        (2, 0, 450): False,
        (2, 499, 500): True,
        (0, 0, 1000): False,  # contigs that have none, before, between and after
        (3, 0, 1000): False,
        (99, 0, 1000): False,
    }
    contig, start, end = np.array(list(cases)).T
    assert found.hit(contig, start, end).tolist() == list(cases.values())


def test_a_list_of_other_genomes_is_no_list_for_these(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text(LIST.replace("a/fly.fa", "fly.fa"))
    with pytest.raises(InputError, match=r"list\.tsv: none of its 2 files, such as b/yeast\.fa, is in .*contigs\.tsv; give"):
        read_exclusions(path, contigs_file(tmp_path, OTHER))


def test_hits_are_those_of_the_bases(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    contigs = contigs_file(tmp_path, CONTIGS + "".join(f"{each}\ts\ts.fa\tc\t300\n" for each in range(9)))
    start = rng.integers(0, 280, 40)
    rows = np.stack([rng.integers(0, 9, 40), start, start + rng.integers(1, 20, 40), np.ones(40, np.int64)], 1)
    bases = {(contig, base) for contig, a, b, _ in rows.tolist() for base in range(a, b)}
    write_exclusions(tmp_path / "list.tsv", merge([stretches(*rows.tolist())]), contigs, ["one"])
    found = read_exclusions(tmp_path / "list.tsv", contigs)
    assert found.bases == len(bases)
    contig, start = rng.integers(0, 10, 2000), rng.integers(0, 300, 2000)
    end = start + rng.integers(0, 40, 2000)
    expected = [
        any((c, base) in bases for base in range(a, b))
        for c, a, b in zip(contig.tolist(), start.tolist(), end.tolist(), strict=True)
    ]
    assert 0.2 < np.mean(expected) < 0.9
    assert found.hit(contig, start, end).tolist() == expected


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("file\trecord", "record\tfile", "not an exclusion list"),
        ("\tEMP/H3\n", "\tEMP", "line 5: has no end"),
        ("500\t550\t", "500\t", "line 3: not file record"),
        ("\t500\t550", "\tx\t550", "line 3: not file record"),
        ("\t500\t550", "\t550\t550", "line 3: 550 to 550 is no stretch"),
        ("\t500\t550", "\t-1\t550", "line 3: -1 to 550 is no stretch"),
        ("450\t500\ttf", "450\t501\ttf", "line 4: 450 to 501 is no stretch of a record of 500"),
        ("1\tX\t500\t", "1\tY\t500\t", "line 4: record 1 of a/fly.fa is 'Y' with 500 bases, but in"),
        ("1\tX\t500\t", "1\tX\t600\t", "with 600 bases, but in"),
        ("fly.fa\t1\t", "fly.fa\t3\t", "line 4: a/fly.fa has no record 3"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "list.tsv"
    assert LIST.count(old) == 1
    path.write_text(LIST.replace(old, new))
    with pytest.raises(InputError, match=r"list\.tsv") as error:
        read_exclusions(path, contigs_file(tmp_path, OTHER))
    assert told in str(error.value)
