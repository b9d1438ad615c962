"""The comparison of tokenizers: numbers that can be told beforehand, one sample for all, table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.tokenizing.compare import compare, open_codec, training_flops
from data_prep.tokenizing.kmer_tokenizer import kmer_json
from tests.data_prep.conftest import random_bases, wrapped


@pytest.fixture(scope="module")
def long_genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One species of 262,000 random bases, in windows of 100,000."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "random.fa").write_bytes(b">r\n" + wrapped(random_bases(0, 262_000), 80))
    return folder


def test_the_formula_is_that_of_training() -> None:
    from pretrain.flops import training_flops as of_training
    from pretrain.model import ModelConfig

    for vocab_size in (4096, 69):
        config = ModelConfig(vocab_size=vocab_size)
        assert training_flops(vocab_size, 12_800, 128 * 12_800, 1900) == of_training(config, 12_800, 128 * 12_800, 1900)
    assert training_flops(4096, 128, 128**2, 0.15 * 126) / 128 / 1e9 == pytest.approx(0.658, abs=0.001)


def test_numbers_that_are_known_beforehand(long_genome: Path, tokenizer_file: Path) -> None:
    result = compare(["overlapping-kmer:6", str(tokenizer_file), "kmer:4", "kmer:1"], long_genome, sequence_length=128)
    overlapping, bpe, kmer, letters = result["tokenizers"]
    assert result["sample_bases"] == 262_000
    assert [row["vocab_size"] for row in result["tokenizers"]] == [4101, 200, 266, 10]
    # Two windows of 763 whole sequences of 131 bases and one of 47, and one window of 473 and 37.
    assert (overlapping["sequences"], overlapping["bases"]) == (2 * 764 + 474, 262_000)
    assert overlapping["tokens"] == 262_000 - 5 * overlapping["sequences"]
    assert overlapping["bases_per_sequence"] == pytest.approx(131, rel=0.01)
    assert (kmer["bases_per_token"], kmer["vocabulary_used"]) == (4.0, 256 / 261)  # no single bases, no N
    assert kmer["sequences_per_megabase"] == pytest.approx(1e6 / 4 / 126, rel=0.01)
    assert kmer["effective_vocabulary"] == pytest.approx(256, rel=0.01)
    assert letters["effective_vocabulary"] == pytest.approx(4, rel=0.001)
    assert 2 < bpe["bases_per_token"] < 5 and bpe["effective_vocabulary"] < 195
    assert overlapping["relative_flops"] == 1
    ratio = kmer["tokens_per_base"] / overlapping["tokens_per_base"]  # but for the smaller head
    assert 0.9 * ratio < kmer["relative_flops"] < ratio


def test_the_same_sample_for_all(genomes: Path, tmp_path: Path) -> None:
    """Species short of a window give it whole; equal seeds draw equal samples, and a file counts as the kind it holds."""
    file = tmp_path / "mine.json"
    file.write_bytes(kmer_json("kmer", 6))
    names = ["kmer:6", str(file)]
    first, second = (compare(names, genomes, sample_bases=600_000, seed=3) for _ in range(2))
    assert first == second
    one, other = first["tokenizers"]
    assert {**one, "name": "mine"} == other


def test_table_and_plot(long_genome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_bytes(kmer_json("kmer", 2))
    files = [str(tmp_path / folder / "tokenizer.json") for folder in ("a", "b")]
    out = tmp_path / "out"
    result = compare(["kmer:3", *files], long_genome, out=out, sample_bases=200_000)
    text = (out / "tokenizers.md").read_text()
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["kmer:3", "a/tokenizer", "b/tokenizer"]
    assert len({line.count("|") for line in lines[:5]}) == 1 and f"{result['sample_bases']:,} bases sampled" in text
    assert lines[2] in capsys.readouterr().err
    assert json.dumps(result)
    image = matplotlib.image.imread(out / "tokenizers.png")
    assert image.std() > 0.05 and np.ptp(image.shape[:2]) > 100


def test_what_cannot_be_compared(long_genome: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--k 9"):
        open_codec("kmer:9")
    for name in ("bpe:9", "kmer:x", "no-such.json"):
        with pytest.raises(InputError, match=rf"{name}: no such file; .*kmer:6 or overlapping-kmer:3"):
            open_codec(name)
    with pytest.raises(InputError, match="--sequence-length 9"):
        compare(["kmer:6"], long_genome, sequence_length=9)
    with pytest.raises(InputError, match=r"no sequence for kmer:6.*in a sample of 0 bases.*at least 100,000"):
        compare(["kmer:6"], long_genome, sample_bases=61_999)
    (tmp_path / "table.md").touch()
    with pytest.raises(InputError, match=r"table\.md: is a file"):
        compare(["kmer:6"], long_genome, out=tmp_path / "table.md")
    with pytest.raises(InputError, match=r"c\.png: is the name of a file; .* name a folder, such as .*/c, which gets"):
        compare(["kmer:6"], long_genome, out=tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
    (tmp_path / "masked.fa").write_text(">n\n" + "N" * 5000)
    with pytest.raises(InputError, match="no sequence for kmer:6"):
        compare(["kmer:6"], tmp_path)
