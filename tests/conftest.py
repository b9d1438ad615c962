"""What tests of more than one folder share: small genomes, a tokenizer and a dataset, made by the real commands."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: tests run side by side, and more threads than cores stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from data_prep.__main__ import run

VOCAB_SIZE = 512


def _command(*arguments: str | Path) -> None:
    assert run([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `synthesize` writes: genomes/ and gue/."""
    path = tmp_path_factory.mktemp("synthetic")
    _command("synthesize", "--out", path, "--bases", "400000", "--species", "3")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, synthetic: Path) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    _command("tokenizer", "--genomes", synthetic / "genomes", "--out", path, "--vocab-size", str(VOCAB_SIZE))
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, synthetic: Path, tiny_tokenizer: Path) -> Path:
    """A finished dataset of several shards, both splits filled; not to be changed."""
    path = tmp_path_factory.mktemp("dataset") / "dataset"
    small = ["--region-bases", "5000", "--unit-bases", "50000", "--valid-fraction", "0.1", "--streams", "8"]
    _command("shard", "--genomes", synthetic / "genomes", "--tokenizer", tiny_tokenizer, "--out", path, *small)
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_dataset: Path) -> list[str]:
    """Arguments of `pretrain train`: so little to do that starting the processes is most of a run's time."""
    return [
        "tiny",
        f"data.path={tiny_dataset}",
        "model.hidden_size=256",  # so that ZeRO 3 keeps small parameters gathered and cuts the large ones (over 100,000)
        "model.intermediate_size=64",
        "train.max_steps=8",
        "train.global_batch_size=11",  # divides by no number of ranks or micro batch in use here
        "train.micro_batch_size=3",
        "train.log_every=1",
        "optimizer.warmup_steps=2",
        "validation.every=4",
        "validation.sequences=10",
        "checkpoint.save_every=3",
    ]
