"""The trained tokenizer: laid out as published, the same every time, on a sample within its budget."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep.cli import InputError, main
from data_prep.codec import Codec
from data_prep.inputs.genomes import find_genomes
from data_prep.tokenizing import train as tokenizer


def test_laid_out_as_published(tokenizer_file: Path) -> None:
    contents = json.loads(tokenizer_file.read_bytes())
    assert list(contents) == [
        *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"),
        *("decoder", "model"),
    ]
    model = contents["model"]
    assert list(model) == [
        *("type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"),
        *("vocab", "merges"),
    ]
    first = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "A", "C", "G", "T"]
    assert list(model["vocab"].items())[:9] == [(token, number) for number, token in enumerate(first)]
    assert list(model["vocab"].values()) == list(range(200))
    assert len(model["merges"]) == 200 - 9
    assert [merge.replace(" ", "") for merge in model["merges"]] == list(model["vocab"])[9:]


def test_behaves_as_published(tokenizer_file: Path) -> None:
    loaded = Tokenizer.from_file(str(tokenizer_file))
    text = "ACGTTGCAACGGTTA"
    single, pair = loaded.encode(text), loaded.encode(text, "TTT")
    assert single.tokens[0] == "[CLS]" and single.tokens[-1] == "[SEP]" and "".join(single.tokens[1:-1]) == text
    assert pair.type_ids == [0] * len(single.ids) + [1] * (len(pair.ids) - len(single.ids))
    assert loaded.encode("AN", add_special_tokens=False).ids == [5, 0]
    assert loaded.encode("nn", add_special_tokens=False).ids == [0, 0]  # not fused


def test_same_bytes_every_time(genomes: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    tokenizer.train(genomes, path, vocab_size=200)
    assert path.read_bytes() == tokenizer_file.read_bytes()
    tokenizer.train(genomes, path, vocab_size=200, sample_bases=20_000, seed=1)
    first = path.read_bytes()
    tokenizer.train(genomes, path, vocab_size=200, sample_bases=20_000, seed=2)
    assert first != path.read_bytes()


def test_the_sample_keeps_to_its_budget(genomes: Path, tmp_path: Path) -> None:
    for budget in (1000, 7_999, 20_000, 10**9):
        result = tokenizer.train(genomes, tmp_path / "t.json", vocab_size=20, sample_bases=budget)
        assert 0.8 * min(budget, 54_000) <= result["sample_bases"] <= budget
    assert result["sample_bases"] == sum(len(w) for g in find_genomes(genomes) for w in tokenizer.clean_windows(g))


def test_windows_hold_only_acgt(genomes: Path) -> None:
    windows = [window for genome in find_genomes(genomes) for window in tokenizer.clean_windows(genome)]
    assert all(len(window) <= 1000 and not set(window) - set("ACGT") for window in windows)
    assert [window for window in windows if len(window) < 100] == ["ACGT"]  # a record, not the rest of one
    assert len(windows) > 50


def test_tokens_do_not_grow_with_copies(tmp_path: Path) -> None:
    """Many copies of one genome would otherwise yield tokens of hundreds of bases."""
    bases = "".join(np.random.default_rng(0).choice(list("ACGT"), 1000))
    (tmp_path / "copies.fa").write_text("".join(f">{copy}\n{bases}\n" for copy in range(50)))
    tokenizer.train(tmp_path, tmp_path / "t.json", vocab_size=1000)
    vocabulary = Tokenizer.from_file(str(tmp_path / "t.json")).get_vocab()
    assert 16 < max(map(len, vocabulary)) <= 32


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "masked.fa").write_bytes(b">a\n" + b"ACGTN" * 1000)
    with pytest.raises(InputError, match="no window of A, C, G, T"):
        tokenizer.train(tmp_path, tmp_path / "t.json")
    with pytest.raises(InputError, match="--vocab-size 8"):
        tokenizer.train(tmp_path, tmp_path / "t.json", vocab_size=8)
    assert not (tmp_path / "t.json").exists()


def test_bpe_has_the_published_ids_and_knows_four_letters():
    trained = tokenizer.train_bpe(["ACGTNNNNACGT", "acgtACGT"] * 20, 12)
    vocabulary = trained.get_vocab()
    first = sorted(vocabulary, key=vocabulary.__getitem__)[:9]
    assert first == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "A", "C", "G", "T"]
    assert len(vocabulary) == 12
    assert trained.encode("NNa").ids == [0, 0, 0]


def command(*words: str) -> int:
    """The verb by itself, as the command line runs it."""
    parser = argparse.ArgumentParser(prog="python -m data_prep")
    tokenizer.register(parser.add_subparsers())
    return main(parser, ["tokenizer", *words])


def test_ram_is_predicted_and_measured(
    genomes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "t.json")
    options = ["--genomes", str(genomes), "--out", out, "--vocab-size", "20", "--sample-bases", "20000"]
    assert command(*options, "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert result["ram_bytes_predicted"] == 100_000_000 + result["sample_bases"] * 50
    assert result["ram_bytes_peak"] > 10_000_000
    assert "takes about 0.10 GB of RAM" in shown.err and "peak RAM of this process" in shown.err
    assert "warning" not in shown.err
    monkeypatch.setattr(tokenizer, "available_memory", lambda: 100_500_000)
    assert command(*options) == 0
    assert "warning: only 0.10 GB of RAM are available" in (warned := capsys.readouterr().err)
    assert "--sample-bases 10000 would fit" in warned


def test_kmers_need_no_genomes(genomes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k.json"
    assert command("--kind", "kmer", "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 4106
    assert Codec(out).k == 6
    assert command("--kind", "overlapping-kmer", "--k", "3", "--out", str(out), "--genomes", str(genomes)) == 0
    assert (Codec(out).kind, Codec(out).k) == ("overlapping-kmer", 3)
    assert f"--genomes {genomes}: not read; overlapping-kmer needs no sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "t.json"], "--genomes: is missing"),
        (["--genomes", "."], "--out: is missing"),
        (["--genomes", ".", "--out", "t.json", "--k", "6"], "--k: is not for --kind bpe"),
        (["--kind", "kmer", "--vocab-size", "300", "--out", "t.json"], "--vocab-size: is not for --kind kmer"),
        (["--kind", "kmer", "--k", "9", "--out", "t.json"], "--k 9: for kmer it must be from 1 to 7"),
        (["--kind", "kmer", "--compare", "a", "--genomes", "."], "--kind and --compare"),
        (["--compare", "a", "--k", "3", "--genomes", "."], "--k: is not for --compare"),
        (["--compare", "kmer:6"], "--genomes: is missing"),
    ],
)
def test_options_that_do_not_fit(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err
