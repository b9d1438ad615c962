"""A tokenizer file as genomes need it: what is spelled, how many bases, for every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.codec import Codec
from data_prep.tokenizing.kmer_tokenizer import KMER, OVERLAPPING, kmer_json
from tests.data_prep.conftest import random_bases

TEXT = random_bases(3, 3001).decode()


@pytest.fixture(params=["bpe", "kmer:6", "kmer:1", "overlapping-kmer:3", "overlapping-kmer:6"])
def codec(request: pytest.FixtureRequest, tokenizer_file: Path, tmp_path: Path) -> Codec:
    if request.param == "bpe":
        return Codec(tokenizer_file)
    kind, k = request.param.split(":")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(kmer_json(kind, int(k)))
    return Codec(path)


def kmers(tmp_path: Path, kind: str, k: int) -> Codec:
    path = tmp_path / f"{kind}.json"
    path.write_bytes(kmer_json(kind, k))
    return Codec(path)


def test_kind_and_k(tokenizer_file: Path, tmp_path: Path) -> None:
    found = [Codec(tokenizer_file), kmers(tmp_path, KMER, 6), kmers(tmp_path, OVERLAPPING, 4)]
    assert [(c.kind, c.k, c.overlap) for c in found] == [("bpe", None, 0), ("kmer", 6, 0), ("overlapping-kmer", 4, 3)]


def test_runs_are_spelled(codec: Codec) -> None:
    runs = [TEXT[:1000], TEXT[1000:1007], TEXT[1007:]]
    tokens, counts = codec.encode(runs)
    assert tokens.dtype == np.uint16 and counts.sum() == len(tokens)
    for run, part in zip(runs, np.split(tokens, np.cumsum(counts)[:-1]), strict=True):
        assert codec.decode(part).decode() == run
        assert codec.spans(part, np.array([len(part)])).tolist() == [len(run)]
    assert codec.decode(tokens[:0]) == b""


def test_spans_of_several_sequences(codec: Codec) -> None:
    tokens, _ = codec.encode([TEXT])
    lengths = np.array([100, 8, 1, len(tokens) - 109], dtype=np.uint16)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert codec.spans(tokens, lengths).tolist() == [len(codec.decode(part)) for part in parts]
    assert codec.spans(tokens[:0], lengths[:0]).tolist() == []


def test_runs_fit_sequences(codec: Codec) -> None:
    content = 126
    size = codec.run_bases(content)
    _, counts = codec.encode([TEXT[:size]])
    if codec.kind == OVERLAPPING:  # a run is a sequence
        assert counts.tolist() == [content]
    else:
        assert abs(size - 8192) < 8 and size % (codec.k or 1) == 0


@pytest.mark.parametrize("k", [3, 6])
def test_runs_shorter_than_overlapping_kmers_have_no_token(tmp_path: Path, k: int) -> None:
    codec = kmers(tmp_path, OVERLAPPING, k)
    tokens, counts = codec.encode(["", "A" * (k - 1), "C" * k, "GT", "T" * (k + 1)])
    assert counts.tolist() == [0, 0, 1, 0, 2] and len(tokens) == 3
    assert codec.encode(["AC"])[1].tolist() == [0]


def test_the_remainder_of_kmers_is_single_bases(tmp_path: Path) -> None:
    codec = kmers(tmp_path, KMER, 6)
    tokens, counts = codec.encode(["ACGTACGTA", "AC", ""])
    assert counts.tolist() == [4, 2, 0]
    assert codec.token_bases[tokens].tolist() == [6, 1, 1, 1, 1, 1]


def test_other_letters_are_not_spelled(codec: Codec) -> None:
    with pytest.raises(InputError, match="does not spell"):
        codec.encode(["ACGTACGTAa"])


def test_special_tokens_have_their_numbers(tokenizer_file: Path, tmp_path: Path) -> None:
    """The loader writes [CLS] as 1: another number would be another token."""
    contents = json.loads(tokenizer_file.read_bytes())
    path = tmp_path / "t.json"
    contents["model"]["vocab"].update({"[PAD]": 0, "[UNK]": 3})
    contents["added_tokens"][0]["id"], contents["added_tokens"][3]["id"] = 3, 0
    path.write_text(json.dumps(contents))
    with pytest.raises(InputError, match=r"t\.json: \[UNK\] is token 3, but training takes it to be 0"):
        Codec(path)
