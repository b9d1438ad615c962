"""The trained tokenizer: laid out as published, the same every time, on a sample within its budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep import tokenizer
from data_prep.cli import InputError
from data_prep.genomes import find_genomes


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
        assert 100 <= result["sample_bases"] <= budget
    assert result["sample_bases"] == sum(len(w) for g in find_genomes(genomes) for w in tokenizer.clean_windows(g))


def test_windows_hold_only_acgt(genomes: Path) -> None:
    windows = [window for genome in find_genomes(genomes) for window in tokenizer.clean_windows(genome)]
    assert all(100 <= len(window) <= 1000 and not set(window) - set("ACGT") for window in windows)
    assert len(windows) > 50


def test_tokens_do_not_grow_with_copies(tmp_path: Path) -> None:
    """Many copies of one genome would otherwise yield tokens of hundreds of bases."""
    bases = "".join(np.random.default_rng(0).choice(list("ACGT"), 1000))
    (tmp_path / "copies.fa").write_text("".join(f">{copy}\n{bases}\n" for copy in range(50)))
    tokenizer.train(tmp_path, tmp_path / "t.json", vocab_size=1000)
    vocabulary = Tokenizer.from_file(str(tmp_path / "t.json")).get_vocab()
    assert 16 < max(map(len, vocabulary)) <= 32


@given(available=st.lists(st.integers(0, 100), min_size=1, max_size=10), budget=st.integers(0, 600))
def test_shares_are_equal_but_for_what_is_not_there(available: list[int], budget: int) -> None:
    shares = tokenizer.fill(available, budget)
    assert sum(shares) == min(budget, sum(available))
    assert all(share <= there for share, there in zip(shares, available, strict=True))
    short = [share for share, there in zip(shares, available, strict=True) if share < there]
    assert not short or max(shares) - min(short) <= 1  # who gets less than it has gets as much as anyone


@pytest.mark.parametrize("quota", [0, 1, 37, 100])
def test_the_choice_of_windows(quota: int) -> None:
    taken = tokenizer.chosen("yeast", 3, 100, quota)
    assert taken.sum() == quota
    assert np.array_equal(taken, tokenizer.chosen("yeast", 3, 100, quota))
    more = tokenizer.chosen("yeast", 3, 100, min(quota + 5, 100))
    assert not (taken & ~more).any()
    if quota == 37:
        assert not np.array_equal(taken, tokenizer.chosen("yeast", 4, 100, quota))
        assert not np.array_equal(taken, tokenizer.chosen("fly", 3, 100, quota))


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
