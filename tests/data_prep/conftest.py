"""Small genomes with the oddities of real ones, a tokenizer for them, and a dataset made of both."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import run
from data_prep.tokenizing import train as tokenizer

# Small enough that every file has several units, and both splits get regions.
SMALL = ["--sequence-length", "20", "--region-bases", "2000", "--unit-bases", "7000", "--valid-fraction", "0.2"]


def random_bases(seed: int, size: int) -> bytes:
    return np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(seed).integers(0, 4, size)].tobytes()


def wrapped(text: bytes, width: int, end: bytes = b"\n") -> bytes:
    return b"".join(text[start : start + width] + end for start in range(0, len(text), width))


@pytest.fixture(scope="session")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of 55 kb: wrapped, on one line, gzip, lower case, N, IUPAC, CRLF, short and empty records."""
    root = tmp_path_factory.mktemp("genomes")
    for folder in ("bacteria/strains", "plant", "virus"):
        (root / folder).mkdir(parents=True)
    long = bytearray(random_bases(1, 21_000))
    long[3000:3050] = b"N" * 50
    long[5000:6000] = long[5000:6000].lower()
    (root / "plant/thale.fa").write_bytes(b">chr1 first\n" + wrapped(bytes(long), 60) + b">chr2\n" + random_bases(2, 3500))
    many = b"".join(b">contig%d\n" % number + wrapped(random_bases(number, 300 * number), 70) for number in range(8))
    (root / "bacteria/strains/coli.fna.gz").write_bytes(gzip.compress(many[:4000]) + gzip.compress(many[4000:]))
    iupac = (
        random_bases(4, 900) + b"RYK-*"[:4] + random_bases(5, 4000) + b"N" + random_bases(6, 9) + b"n" + random_bases(7, 50)
    )
    (root / "bacteria/odd.fasta").write_bytes(b">odd\r\n" + wrapped(iupac, 50, b"\r\n"))
    (root / "virus/phage.fa").write_bytes(b">same\nACGT\n>same\n" + random_bases(8, 4321) + b"\n>same\n>none\n")
    (root / "root.fa").write_bytes(b">r\n" + random_bases(9, 12_345))
    return root


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, genomes: Path) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(genomes, path, vocab_size=200)
    return path


@pytest.fixture(scope="session")
def shard(genomes: Path, tokenizer_file: Path) -> Callable[..., int]:
    """`shard(out, *options)` runs the command on the small genomes and returns its exit status."""

    def command(out: Path, *options: str) -> int:
        return run(
            [
                "shard",
                "--genomes",
                str(genomes),
                "--tokenizer",
                str(tokenizer_file),
                "--out",
                str(out),
                *SMALL,
                *options,
            ]
        )

    return command


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, shard: Callable[..., int]) -> Path:
    """A finished dataset; not to be changed."""
    path = tmp_path_factory.mktemp("dataset") / "whole"
    assert shard(path) == 0
    return path
