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
from tokenizers import Tokenizer

from data_prep import pack
from data_prep.cli import InputError
from data_prep.codec import Codec
from data_prep.dataset import SPECIALS
from data_prep.kmers import reverse_complement
from data_prep.pack import MINIMUM_TOKENS, Packed, Packer, Tally
from tests.data_prep.conftest import random_bases

Sequences = list[tuple[list[int], int, int]]
texts = st.lists(
    st.one_of(st.text("ACGT", max_size=30), st.text("ACGT", min_size=200, max_size=300), st.just("N"), st.just("NNN")),
    max_size=8,
).map("".join)


def tokens_of(tokenizer: Tokenizer, text: str, run_bases: int) -> list[int]:
    tokens: list[int] = []
    for offset in range(0, len(text), run_bases):
        tokens += tokenizer.encode(text[offset : offset + run_bases], add_special_tokens=False).ids
    return tokens


def plain(tokenizer: Tokenizer, regions: list[str], content: int, run_bases: int) -> Sequences:
    """The rules of contiguous packing, token by token."""
    found: Sequences = []
    for contig, region in enumerate(regions):
        for match in re.finditer("[ACGT]+", region):
            tokens, start = tokens_of(tokenizer, match[0], run_bases), 1000 + match.start()
            while tokens:
                taken, tokens = tokens[:content], tokens[content:]
                if len(taken) >= MINIMUM_TOKENS:
                    found.append((taken, contig, start))
                start += sum(len(str(tokenizer.id_to_token(token))) for token in taken)
    return found


def plain_paper(tokenizer: Tokenizer, regions: list[str], content: int) -> Sequences:
    """The rules of the paper's packing."""
    found: Sequences = []
    for contig, region in enumerate(regions):
        for start in range(0, len(region), 1000):
            piece = region[start : start + 1000]
            tokens = [] if "N" in piece else tokens_of(tokenizer, piece, 1000)[:content]
            if len(tokens) >= MINIMUM_TOKENS:
                found.append((tokens, contig, 1000 + start))
    return found


def packed(codec: Codec, regions: list[str], content: int, **options: str) -> tuple[list[Packed], Tally]:
    found: list[Packed] = []
    packer = Packer(codec, content + 2, **options)
    for contig, region in enumerate(regions):
        packer.add(found.append, contig, 1000, region.encode())
    packer.flush()
    return found, packer.tally


def cut(each: Packed) -> list[np.ndarray]:
    return np.split(each.tokens, np.cumsum(each.lengths)[:-1])


def sequences(found: list[Packed], strand: int = 1) -> Sequences:
    return [
        (tokens.tolist(), *place)
        for each in found
        if each.strand == strand
        for tokens, place in zip(cut(each), each.source()[:, :2].tolist(), strict=True)
    ]


def check_spelling(codec: Codec, regions: list[str], found: list[Packed]) -> None:
    """Every sequence spells what stands at its place, on its strand."""
    for each in found:
        for tokens, (contig, place, strand), bases in zip(
            cut(each), each.source().tolist(), each.bases.tolist(), strict=True
        ):
            assert (contig, strand) == (each.contig, each.strand)
            text = regions[each.contig][place - 1000 : place - 1000 + bases].encode()
            assert codec.decode(tokens) == (text if each.strand > 0 else reverse_complement(text))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(regions=st.lists(texts, max_size=5), content=st.integers(8, 40), batch_bases=st.sampled_from([1, 300, 1 << 20]))
def test_packing_follows_its_rules(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, regions: list[str], content: int, batch_bases: int
) -> None:
    monkeypatch.setattr(Codec, "run_bases", lambda self, content: 100)
    monkeypatch.setattr(pack, "BATCH_BASES", batch_bases)
    codec, tokenizer = Codec(tokenizer_file), Tokenizer.from_file(str(tokenizer_file))
    found, tally = packed(codec, regions, content)
    assert sequences(found) == plain(tokenizer, regions, content, 100)
    check_spelling(codec, regions, found)
    assert tally.total == sum(map(len, regions))
    assert tally.dropped["not_acgt"] == sum(region.count("N") for region in regions)
    assert tally.kept == sum(int(each.bases.sum()) for each in found)
    assert tally.dropped["short_tail"] == tally.total - tally.kept - tally.dropped["not_acgt"]

    both, tally_of_both = packed(codec, regions, content, strands="both")
    assert sequences(both) == sequences(found) and tally_of_both == tally
    check_spelling(codec, regions, both)
    mirrored = [reverse_complement(region.encode()).decode() for region in regions]
    back = [[each for each in both if each.strand < 0 and each.contig == contig] for contig in range(len(regions))]
    for contig, region in enumerate(mirrored):  # the other strand is packed as if it were the genome
        alone = sequences(packed(codec, [region], content)[0])
        assert sorted(str(tokens) for tokens, _, _ in alone) == sorted(str(s[0]) for s in sequences(back[contig], -1))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 3)), max_size=5), content=st.integers(8, 300))
def test_the_packing_of_the_paper(tokenizer_file: Path, parts: list[tuple[int, int]], content: int) -> None:
    text = random_bases(content, 3000).decode()
    region = "".join(text[:size] + "N" * gap for size, gap in parts)
    codec = Codec(tokenizer_file)
    found, tally = packed(codec, [region], content, packing="paper")
    assert sequences(found) == plain_paper(Tokenizer.from_file(str(tokenizer_file)), [region], content)
    check_spelling(codec, [region], found)
    assert tally.total == len(region) and tally.dropped["not_acgt"] == region.count("N")
    assert tally.kept == sum(int(each.bases.sum()) for each in found)


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
