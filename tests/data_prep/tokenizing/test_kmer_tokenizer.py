"""k-mer tokenizers: files that load anywhere, and the look-up of tables against the `tokenizers` library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.cli import InputError
from data_prep.codec import TextEncoder
from data_prep.tokenizing import kmer_tokenizer
from data_prep.tokenizing.kmer_tokenizer import KMER, LONGEST, OVERLAPPING, kmer_json, read_kmers, vocabulary
from tests.data_prep.conftest import random_bases

EVERY_KIND = [(kind, k) for kind in (KMER, OVERLAPPING) for k in range(1 if kind == KMER else 2, LONGEST + 1)]


def load(kind: str, k: int) -> Tokenizer:
    return Tokenizer.from_str(kmer_json(kind, k).decode())


def spaced(text: str, k: int) -> str:
    """DNABERT's convention."""
    return " ".join(text[start : start + k] for start in range(len(text) - k + 1))


def by_library(tokenizer: Tokenizer, kind: str, k: int, texts: list[str]) -> list[list[int]]:
    texts = texts if kind == KMER else [spaced(text, k) for text in texts]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_ids_are_special_tokens_kmers_single_bases_n() -> None:
    tokens = vocabulary(KMER, 6)
    assert list(tokens.values()) == list(range(5 + 4**6 + 5))
    assert (tokens["[UNK]"], tokens["[MASK]"], tokens["AAAAAA"], tokens["AAAAAC"], tokens["TTTTTT"]) == (0, 4, 5, 6, 4100)
    assert [tokens[letter] for letter in "ACGTN"] == [4101, 4102, 4103, 4104, 4105]
    assert len(vocabulary(OVERLAPPING, 3)) == 5 + 4**3
    assert list(vocabulary(KMER, 1))[5:] == ["A", "C", "G", "T", "N"]
    for kind, k in ((KMER, 0), (KMER, 8), (OVERLAPPING, 1), (OVERLAPPING, 8)):
        with pytest.raises(InputError, match=f"--k {k}: for {kind} it must be from"):
            kmer_json(kind, k)


def test_plain_text_is_cut_anywhere(tmp_path: Path) -> None:
    """By `tokenizers` and by transformers alone: k-mers, remainders, N, and an [UNK] for each other letter."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    path.write_bytes(kmer_json(KMER, 6))
    text = "ACGTACGTNNACGTACaaG TT"
    expected = ["ACGTAC", "G", "T", "N", "N", "ACGTAC", "[UNK]", "[UNK]", "G", "T", "T"]
    encoding = Tokenizer.from_file(str(path)).encode(text)
    assert encoding.tokens == ["[CLS]", *expected, "[SEP]"]
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(path), unk_token="[UNK]", mask_token="[MASK]")
    assert loaded(text)["input_ids"] == encoding.ids
    assert loaded.decode(loaded("ACGTACGTN", add_special_tokens=False)["input_ids"]) == "ACGTACGTN"


def test_overlapping_kmers_are_read_with_spaces_between_them(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    path.write_bytes(kmer_json(OVERLAPPING, 3))
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(path), unk_token="[UNK]")
    assert loaded.convert_ids_to_tokens(loaded("ACG CGT GTA")["input_ids"]) == ["[CLS]", "ACG", "CGT", "GTA", "[SEP]"]
    plain = TextEncoder(load(OVERLAPPING, 3))(["ACGTA"])[0]
    assert plain.tolist() == loaded("ACG CGT GTA", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("kind", "k"), EVERY_KIND)
def test_a_file_tells_its_kind(kind: str, k: int) -> None:
    encoder = TextEncoder(load(kind, k))
    assert (encoder.kind, encoder.k) == (kind, k)


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from([(KMER, 1), (KMER, 2), (KMER, 3), (KMER, 6), (OVERLAPPING, 2), (OVERLAPPING, 3), (OVERLAPPING, 5)]),
    texts=st.lists(
        st.one_of(st.text("ACGT", max_size=20), st.text("ACGTN", max_size=20), st.text("ACGTNaRé-", max_size=20)), max_size=8
    ),
)
def test_tables_give_the_tokens_of_the_file(case: tuple[str, int], texts: list[str]) -> None:
    tokenizer = load(*case)
    tokens, counts = TextEncoder(tokenizer)(texts)
    expected = by_library(tokenizer, *case, texts)
    assert counts.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]


@pytest.mark.parametrize(("kind", "k"), [(KMER, 6), (OVERLAPPING, 6), (KMER, 7), (OVERLAPPING, 7)])
def test_long_texts_in_several_groups(kind: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmer_tokenizer, "_CHUNK_BASES", 1000)
    texts = [random_bases(size, size).decode() for size in (999, 1, 0, 2500, 300, 300, 300, 300)]
    tokenizer = load(kind, k)
    tokens, counts = TextEncoder(tokenizer)(texts)
    expected = by_library(tokenizer, kind, k, texts)
    assert counts.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]


def test_spaces_vanish_under_kmers_as_in_the_file() -> None:
    tokenizer = load(KMER, 3)
    assert TextEncoder(tokenizer)(["AC GTA\tC"])[0].tolist() == by_library(tokenizer, KMER, 3, ["AC GTA\tC"])[0]


def test_ids_may_be_others() -> None:
    """Tables follow the file's numbers, whatever their order."""
    contents = json.loads(kmer_json(OVERLAPPING, 2))
    numbers = contents["model"]["vocab"]
    numbers["AA"], numbers["TT"] = numbers["TT"], numbers["AA"]
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    assert TextEncoder(tokenizer)(["AATTC"])[0].tolist() == by_library(tokenizer, OVERLAPPING, 2, ["AATTC"])[0]


def test_what_only_looks_like_kmers_is_left_to_the_library() -> None:
    contents = json.loads(kmer_json(KMER, 2))
    contents["pre_tokenizer"]["pattern"]["Regex"] = "[ACGT]{2}|N"
    assert read_kmers(contents) is None
    contents = json.loads(kmer_json(OVERLAPPING, 2))
    assert read_kmers(contents) is not None
    del contents["model"]["vocab"]["CG"]
    assert read_kmers(contents) is None
    contents = json.loads(kmer_json(OVERLAPPING, 2)) | {"normalizer": {"type": "Lowercase"}}
    assert read_kmers(contents) is None
    assert TextEncoder(Tokenizer.from_str(json.dumps(contents))).kind == "wordlevel"
