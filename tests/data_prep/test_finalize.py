"""When a dataset may be committed, and what its manifest says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import run
from data_prep.cli import InputError
from data_prep.dataset import Dataset
from data_prep.finalize import finalize, streams_of, summary
from data_prep.storage import file_sha256

Shard = Callable[..., int]


def test_the_manifest_adds_up(dataset: Path) -> None:
    manifest = Dataset(dataset).manifest
    for split in ("train", "valid"):
        for key in ("sequences", "tokens"):
            assert manifest["splits"][split][key] == sum(row[key][split] for row in manifest["species"])
    assert sum(row["weight"] for row in manifest["species"]) == pytest.approx(1)
    expected = {"tokenizer.json", "train/contigs.tsv", "train/shards.npy", "valid/shards.npy"}
    assert manifest["files"] == {name: file_sha256(dataset / name) for name in expected}
    sha256 = manifest["files"]["tokenizer.json"]
    assert manifest["tokenizer"] == {"sha256": sha256, "vocab_size": 200, "kind": "bpe", "k": None}
    constants = {"format_version": 1, "packing": "contiguous", "strands": "forward", "minimum_tokens": 8, "seed": 0}
    constants |= {"duplicates_removed": "near", "excluded": None, "run_bases": 8192}
    chosen = {"sequence_length": 20, "unit_bases": 7000, "region_bases": 2000, "valid_fraction": 0.2}
    assert {key: manifest[key] for key in constants | chosen} == constants | chosen
    totals = summary(Dataset(dataset))
    assert totals["bases_in"] == sum(row["bases"]["in"] for row in manifest["species"])


def test_missing_units_are_named(shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert shard(out, "--num-tasks", "2", "--task", "0") == 0
    assert run(["finalize", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "5 of 10 units are missing (5, 6, 7, 8, 9)" in error and "python -m data_prep shard" in error
    with pytest.raises(InputError, match="has not begun a dataset"):
        finalize(tmp_path / "elsewhere")


def test_files_changed_on_the_way_are_found(shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path, "--num-tasks", "1", "--task", "0") == 0
    (tmp_path / ".work/tokenizer.json").write_bytes(b"{}")
    assert run(["finalize", str(tmp_path)]) == 2
    assert "tokenizer.json: was changed" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


def test_a_split_may_be_empty_but_train_may_not(shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path / "none", "--valid-fraction", "0") == 0
    assert len(Dataset(tmp_path / "none").split("valid").shards) == 0
    assert shard(tmp_path / "few", "--valid-fraction", "0.0001") == 0
    assert "no region fell to validation" in capsys.readouterr().err
    assert shard(tmp_path / "all", "--valid-fraction", "0.999999") == 2
    assert "no sequence to train on" in capsys.readouterr().err
    assert not (tmp_path / "all" / "manifest.json").exists()


def test_streams() -> None:
    counts = (1, 2047, 2048, 4095, 4096, 2048 * 7, 2048 * 4096, 10**12)
    assert [streams_of(None, sequences) for sequences in counts] == [1, 1, 1, 1, 2, 4, 4096, 4096]
    assert streams_of(3, 100) == 3
    with pytest.raises(InputError, match="--streams 101"):
        streams_of(101, 100)
