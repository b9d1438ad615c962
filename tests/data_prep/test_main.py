"""The command line: help, `--json`, and status 2 with one line that names what is wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import run

Shard = Callable[..., int]


@pytest.mark.parametrize(
    "verb",
    ["synthesize", "catalog", "fetch", "tokenizer", "shard", "finalize", "verify", "report", "audit", "bench"],
)
def test_help_tells_every_default(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([verb, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--json" in text and "--debug" in text
    for word in {
        "shard": ["128", "16000000", "1000000", "0.02"],
        "tokenizer": ["4096", "50000000", "bytes of RAM"],
    }.get(verb, []):
        assert word in text


def test_the_whole_way_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(*argv: str) -> dict:
        assert run([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    data, tokenizer, out = str(tmp_path / "data"), str(tmp_path / "tokenizer.json"), str(tmp_path / "dataset")
    made = result("synthesize", "--out", data, "--bases", "200000", "--species", "2")
    assert made["bases"] == 200_000
    trained = result("tokenizer", "--genomes", f"{data}/genomes", "--out", tokenizer, "--vocab-size", "300")
    assert trained["vocab_size"] == 300 and 100_000 < trained["sample_bases"] <= 200_000
    options = ["--region-bases", "20000", "--valid-fraction", "0.2"]
    whole = result("shard", "--genomes", f"{data}/genomes", "--tokenizer", tokenizer, "--out", out, *options)
    assert whole["bases_in"] == 200_000 and 190_000 < whole["bases_kept"] < 200_000
    assert whole["tokens"]["train"] > whole["tokens"]["valid"] > 0
    assert whole["sequences"]["train"] >= whole["tokens"]["train"] / 126
    again = result("finalize", out)
    assert {key: whole[key] for key in again} == again


BAD = {
    "empty.fa": (b"", ["empty.fa", "empty"]),
    "protein.fasta": (
        b">ok\nACGT\n>sp|P1|INS_HUMAN Insulin\nMALWMRLLPL\n",
        ["protein.fasta", "'sp|P1|INS_HUMAN'", "'L'"],
    ),
    "cut.fa.gz": (
        gzip.compress(b">chr1\n" + b"ACGT" * 500, mtime=0)[:-9],
        ["cut.fa.gz", "truncated"],
    ),
    "headless.fna": (b"ACGTACGT\n", ["headless.fna", "header"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_genomes(name: str, genomes: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    """As a user sees it, in a process of its own: the good file beside the bad one must not hide it."""
    contents, words = BAD[name]
    folder, out = tmp_path / "genomes", tmp_path / "out"
    folder.mkdir()
    (folder / "a_good.fa").write_bytes((genomes / "root.fa").read_bytes())
    (folder / name).write_bytes(contents)
    python = [sys.executable, "-m", "data_prep"]
    shard = ["shard", "--genomes", str(folder), "--tokenizer", str(tokenizer_file), "--out", str(out)]
    train = ["tokenizer", "--genomes", str(folder), "--out", str(tmp_path / "t.json")]
    for command in (shard, train):
        done = subprocess.run([*python, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        error = done.stderr.splitlines()[-1]
        assert all(word in error for word in ["error:", *words])
    assert not (out / "manifest.json").exists()
    assert not (tmp_path / "t.json").exists()
    assert run(["finalize", str(out)]) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--genomes", "{tmp}/nowhere"], "nowhere: not a folder"),
        (["--genomes", "{tmp}"], "no FASTA file"),
        (["--tokenizer", "{tmp}/nowhere.json"], "nowhere.json: No such file"),
        (["--tokenizer", "{tmp}/text.json"], "text.json: not a Hugging Face tokenizer"),
        (["--sequence-length", "9"], "--sequence-length 9"),
        (["--valid-fraction", "1"], "--valid-fraction 1"),
        (["--unit-bases", "0"], "--unit-bases 0"),
        (["--num-tasks", "2"], "--num-tasks and --task go together"),
        (["--num-tasks", "2", "--task", "2"], "--task 2: must be from 0"),
        (["--streams", "100000"], "--streams 100000"),
    ],
)
def test_bad_options(
    options: list[str], words: str, shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.json").write_text("not json")
    assert shard(tmp_path / "out", *(option.replace("{tmp}", str(tmp_path)) for option in options)) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_debug_shows_the_traceback(shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path / "out", "--seed", "1", "--tokenizer", "nowhere", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
