"""Datasets of the same genomes with longer sequences: the same tokens, cut elsewhere, and the same validation regions."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.__main__ import run
from data_prep.codec import Codec
from data_prep.dataset import SPLITS, Dataset
from data_prep.pack import MINIMUM_TOKENS

REGION_BASES = 12_800  # of these small genomes, for sequences of 128 tokens
Place = tuple[int, int]  # contig, first base


def shard(genomes: Path, tokenizer: Path, out: Path, *options: str) -> Dataset:
    arguments = ["--genomes", str(genomes), "--tokenizer", str(tokenizer), "--out", str(out), "--duplicates", "none"]
    assert run(["shard", *arguments, "--valid-fraction", "0.2", "--streams", "4", *options]) == 0
    return Dataset(out)


def places(dataset: Dataset, split: str, letters: list[int]) -> dict[Place, tuple[int, Place]]:
    """Each token by its first base: which token it is, and where the next one begins."""
    found: dict[Place, tuple[int, Place]] = {}
    part = dataset.split(split)
    for row in range(len(part.shards)):
        for number in range(len(part.blocks(row))):
            block = part.read_block(row, number)
            for each, (contig, start, _) in enumerate(block.source.tolist()):
                for token in block.sequence(each).tolist():
                    end = start + letters[token]
                    assert found.setdefault((contig, start), (token, (contig, end))) == (token, (contig, end))
                    start = end
    return found


@pytest.mark.parametrize("kind", ["bpe", "kmer"])
def test_longer_sequences_hold_the_same_tokens_but_for_tails(
    kind: str, synthetic: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer
    if kind == "kmer":
        tokenizer = tmp_path / "kmer.json"
        assert run(["tokenizer", "--kind", "kmer", "--k", "3", "--out", str(tokenizer)]) == 0
    genomes = synthetic / "genomes"
    short = shard(genomes, tokenizer, tmp_path / "short")
    long = shard(genomes, tokenizer, tmp_path / "long", "--sequence-length", "512", "--region-tokens", "128")
    assert run(["verify", str(tmp_path / "long"), "--genomes", str(genomes)]) == 0
    letters = Codec(tokenizer).token_bases.tolist()
    lengths = long.split("train").read_block(0, 0).lengths
    assert lengths.max() == 510
    tails = 0
    for split in SPLITS:
        few, many = places(short, split, letters), places(long, split, letters)
        assert len(few) > 1000
        assert all(few[place] == many[place] for place in few.keys() & many.keys())
        rest = few | many
        only = {place: rest[place][1] for place in few.keys() ^ many.keys()}
        for first in only.keys() - set(only.values()):  # the first token of each stretch that one of them has alone
            tail = [first]
            while tail[-1] in only:
                tail.append(only[tail[-1]])
            assert len(tail) - 1 < MINIMUM_TOKENS
            assert tail[-1] not in rest or tail[-1][1] % REGION_BASES == 0  # nothing of the piece comes after it
            tails += 1
    assert tails > 0


def test_without_the_option_small_genomes_are_validated_on_other_regions(
    synthetic: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    genomes = synthetic / "genomes"
    short = shard(genomes, tiny_tokenizer, tmp_path / "short")
    long = shard(genomes, tiny_tokenizer, tmp_path / "long", "--sequence-length", "512")
    letters = Codec(tiny_tokenizer).token_bases.tolist()
    assert places(short, "train", letters).keys() & places(long, "valid", letters).keys()


def test_the_option_is_part_of_what_a_dataset_is(
    synthetic: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genomes, out = synthetic / "genomes", tmp_path / "out"
    options = ["--sequence-length", "512", "--region-tokens"]
    assert shard(genomes, tiny_tokenizer, out, *options, "128").manifest["region_tokens"] == 128
    arguments = ["--genomes", str(genomes), "--tokenizer", str(tiny_tokenizer), "--out", str(out), "--duplicates", "none"]
    assert run(["shard", *arguments, "--valid-fraction", "0.2", "--streams", "4", *options, "256"]) == 2
    assert "was made with --region-tokens 128, not 256" in capsys.readouterr().err
    assert run(["shard", *arguments, *options, "0"]) == 2
    assert "--region-tokens 0: must be at least 1" in capsys.readouterr().err
