"""The bench runs, takes both from the same bases, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.__main__ import run


def test_bench(
    genomes: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    given = ["bench", "--genomes", str(genomes), "--tokenizer", str(tokenizer_file), "--repeats", "1"]
    assert run([*given, "--processes", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    (both,) = result["runs"]
    assert both["bases"] == 54_535 and both["processes"] == 2
    assert result["ratio"] == both["ratio"] == pytest.approx(both["shard_bases_per_second"] / both["bare_bases_per_second"])
    assert result["hours_for_corpus"]["1"] == pytest.approx(100 * result["hours_for_corpus"]["100"])
    assert not list(tmp_path.iterdir())
    assert run([*given, "--processes", "0"]) == 2
    assert "--processes" in capfd.readouterr().err
