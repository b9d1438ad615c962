"""Packing against a plain implementation of its rules, and tokenizer files that can't be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep import pack
from data_prep.cli import InputError
from data_prep.codec import Codec
from data_prep.dataset import SPECIALS
from data_prep.pack import MINIMUM_TOKENS, Packer

Sequences = list[tuple[list[int], int, int]]
texts = st.lists(
    st.one_of(st.text("ACGT", max_size=30), st.text("ACGT", min_size=200, max_size=300), st.just("N"), st.just("NNN")),
    max_size=8,
).map("".join)


def plain(tokenizer: Tokenizer, regions: list[str], content: int, run_bases: int) -> Sequences:
    """The rules of pack.py, token by token."""
    found: Sequences = []
    for contig, region in enumerate(regions):
        for match in re.finditer("[ACGT]+", region):
            text, start = match[0], 1000 + match.start()
            tokens: list[int] = []
            for offset in range(0, len(text), run_bases):
                tokens += tokenizer.encode(text[offset : offset + run_bases], add_special_tokens=False).ids
            while tokens:
                taken, tokens = tokens[:content], tokens[content:]
                if len(taken) >= MINIMUM_TOKENS:
                    found.append((taken, contig, start))
                start += sum(len(str(tokenizer.id_to_token(token))) for token in taken)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(regions=st.lists(texts, max_size=5), content=st.integers(8, 40), batch_bases=st.sampled_from([1, 300, 1 << 20]))
def test_packing_follows_its_rules(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, regions: list[str], content: int, batch_bases: int
) -> None:
    monkeypatch.setattr(pack, "RUN_BASES", 100)
    monkeypatch.setattr(pack, "BATCH_BASES", batch_bases)
    found: Sequences = []

    def sink(tokens: NDArray[np.uint16], contig: int, start: int) -> None:
        found.append((tokens.tolist(), contig, start))

    codec = Codec(tokenizer_file)
    packer = Packer(codec, content + 2)
    for contig, region in enumerate(regions):
        packer.add(sink, contig, 1000, region.encode())
    packer.flush()
    assert found == plain(Tokenizer.from_file(str(tokenizer_file)), regions, content, 100)
    tally = packer.tally
    assert tally.total == sum(map(len, regions))
    assert tally.not_acgt == sum(region.count("N") for region in regions)
    assert tally.kept == sum(int(codec.token_bases[tokens].sum()) for tokens, _, _ in found)
    assert tally.kept + tally.not_acgt + tally.short_tail == tally.total


def edited(source: Path, path: Path, **changes: Any) -> Path:
    """A copy of a tokenizer file with some of its model's keys, or of its own, replaced."""
    contents = json.loads(source.read_bytes())
    for key, value in changes.items():
        (contents["model"] if key in contents["model"] else contents)[key] = value
    path.write_text(json.dumps(contents))
    return path


def test_truncation_in_the_file_is_not_applied(tokenizer_file: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path = edited(tokenizer_file, tmp_path / "t.json", truncation=truncation)
    runs = ["ACGT" * 50, "G" * 70]
    mine, original = Codec(path).encode(runs), Codec(tokenizer_file).encode(runs)
    assert np.array_equal(mine[0], original[0]) and np.array_equal(mine[1], original[1])


def test_a_tokenizer_that_does_not_cover_acgt_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    specials = {name: number for number, name in enumerate(SPECIALS)}
    path = edited(tokenizer_file, tmp_path / "t.json", vocab={**specials, "A": 5, "C": 6, "G": 7}, merges=[])
    codec = Codec(path)
    assert codec.encode(["ACG"])[0].tolist() == [5, 6, 7]
    with pytest.raises(InputError, match=r"t\.json.*does not spell"):
        codec.encode(["ACG", "ACGT"])


def test_tokenizer_files_that_cannot_be_used(tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for contents in (b"", b"{}", b"[1]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=r"t\.json: not a Hugging Face tokenizer"):
            Codec(path)
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, **{letter: 5 + i for i, letter in enumerate("ACGT")}}
    edited(tokenizer_file, path, vocab=vocabulary, merges=[], added_tokens=[])
    with pytest.raises(InputError, match=r"has no token \[MASK\]"):
        Codec(path)
    vocabulary = {**{name: number for number, name in enumerate(SPECIALS)}, "A": 70_000}
    edited(tokenizer_file, path, vocab=vocabulary, merges=[])
    with pytest.raises(InputError, match=r"70001 tokens.*uint16"):
        Codec(path)
