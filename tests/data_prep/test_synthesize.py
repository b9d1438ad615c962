"""The made-up data: the same every time, as odd as real data, and with a signal that can be learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.inputs.fasta import read_fasta
from data_prep.inputs.genomes import find_genomes, scan
from data_prep.synthesize import synthesize


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "data"
    synthesize(path, bases=300_001, species=3, seed=5)
    return path


def read_task(path: Path) -> tuple[list[str], np.ndarray]:
    lines = path.read_text().splitlines()
    assert lines[0] == "sequence,label"
    rows = [line.split(",") for line in lines[1:]]
    return [sequence for sequence, _ in rows], np.array([int(label) for _, label in rows])


def test_same_bytes_every_time(made: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "again", bases=300_001, species=3, seed=5)
    synthesize(tmp_path / "other", bases=300_001, species=3, seed=6)
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert (made / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_genomes_are_as_odd_as_real_ones(made: Path) -> None:
    genomes = find_genomes(made / "genomes")
    assert [genome.path.suffix for genome in genomes] == [".fa", ".fa", ".gz"]
    assert len({genome.category for genome in genomes}) == 3
    scans = [scan(genome) for genome in genomes]
    assert sum(sum(found.lengths) for found in scans) == 300_001
    assert all(len(set(found.names)) == 4 for found in scans)
    for genome in genomes:
        assert any(b"N" in piece.bases for piece in read_fasta(genome.path))
    assert b"acg" in genomes[0].path.read_bytes()


def test_the_task_can_be_learnt(made: Path) -> None:
    """Naive Bayes on 5-mers tells the classes apart, single bases do not."""
    folder = made / "gue/synthetic/motif"

    def features(name: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        sequences, labels = read_task(folder / f"{name}.csv")
        assert {len(sequence) for sequence in sequences} == {100}
        codes = np.array([["ACGT".index(letter) for letter in sequence] for sequence in sequences])
        words = sum(codes[:, shift : 101 - k + shift] * 4**shift for shift in range(k))
        counts = np.zeros((len(codes), 4**k))
        np.add.at(counts, (np.arange(len(codes))[:, None], words), 1)
        return counts, labels

    accuracy = {}
    for k in (1, 5):
        (x, y), (test_x, test_y) = features("train", k), features("test", k)
        assert (len(y), y.sum(), len(test_y), test_y.sum()) == (2000, 1000, 400, 200)
        odds = np.log((x[y == 1].sum(0) + 1) / (x[y == 0].sum(0) + 1))
        accuracy[k] = ((test_x @ odds > np.median(x @ odds)) == test_y).mean()
    assert accuracy[1] < 0.6
    assert accuracy[5] > 0.85


def test_no_sequence_is_in_two_files(made: Path) -> None:
    rows = [read_task(made / f"gue/synthetic/motif/{name}.csv")[0] for name in ("train", "dev", "test")]
    assert len({sequence for sequences in rows for sequence in sequences}) == 2800


def test_what_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--bases 100"):
        synthesize(tmp_path / "out", bases=100)
    with pytest.raises(InputError, match="--species 0"):
        synthesize(tmp_path / "out", species=0)
    (tmp_path / "mine.txt").write_bytes(b"")
    with pytest.raises(InputError, match="not an empty folder"):
        synthesize(tmp_path)
