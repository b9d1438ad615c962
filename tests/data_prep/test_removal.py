"""What is taken out of a dataset, that nothing else is, and that a kill in the middle changes no byte."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import shard as building
from data_prep.__main__ import run
from data_prep.codec import Codec
from data_prep.dataset import SPLITS, Dataset
from data_prep.kmers import reverse_complement
from tests.data_prep.conftest import random_bases

BASES = 40_000


def mutated(text: bytes, every: int) -> bytes:
    letters = bytearray(text)
    for place in range(every // 2, len(letters), every):
        letters[place] = b"CGTA"[b"ACGT".index(letters[place])]
    return bytes(letters)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genome, near copies of it (other phase, other strand, one with a part of its own), and one that is not."""
    root = tmp_path_factory.mktemp("copies")
    original = random_bases(1, BASES)
    files = {
        "a": original,
        "b": mutated(original[137:], 300),
        "c": reverse_complement(original[:30_000]) + random_bases(2, 10_000),
        "d": random_bases(3, BASES),
    }
    for name, text in files.items():
        (root / f"{name}.fa").write_bytes(b">%s\n%s\n" % (name.encode(), text))
    return root


def command(genomes: Path, tokenizer: Path, out: Path, *options: str) -> int:
    given = ["--unit-bases", "15000", "--region-bases", "13000", "--valid-fraction", "0.3", "--sequence-length", "64"]
    return run(["shard", "--genomes", str(genomes), "--tokenizer", str(tokenizer), "--out", str(out), *given, *options])


def sequences(path: Path) -> Iterator[tuple[str, int, int, int, int, bytes]]:
    """Split, contig, start, end, strand and tokens of every sequence, in order."""
    dataset = Dataset(path)
    codec = Codec(dataset.tokenizer_path)
    for name in SPLITS:
        split = dataset.split(name)
        for row in range(len(split.shards)):
            for number in range(len(split.blocks(row))):
                block = split.read_block(row, number)
                spans = codec.spans(block.tokens, block.lengths).tolist()
                for each, (contig, start, strand) in enumerate(block.source.tolist()):
                    yield name, contig, start, start + spans[each], strand, block.sequence(each).tobytes()


def tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def totals(path: Path) -> dict[str, int]:
    """Bases of all species, by where they went; checks that they add up."""
    found: dict[str, int] = {}
    for row in Dataset(path).manifest["species"]:
        assert row["bases"]["in"] == row["bases"]["kept"] + sum(row["bases"]["dropped"].values())
        for reason, bases in {"kept": row["bases"]["kept"], **row["bases"]["dropped"]}.items():
            found[reason] = found.get(reason, 0) + bases
    return found


@pytest.mark.parametrize("strands", ["forward", "both"])
def test_copies_go_and_the_rest_stays(copies: Path, tokenizer_file: Path, tmp_path: Path, strands: str) -> None:
    assert command(copies, tokenizer_file, tmp_path / "all", "--strands", strands, "--duplicates", "none") == 0
    assert command(copies, tokenizer_file, tmp_path / "near", "--strands", strands) == 0
    everything, kept = list(sequences(tmp_path / "all")), list(sequences(tmp_path / "near"))
    dropped = [sequence for sequence in everything if sequence not in set(kept)]
    assert [sequence for sequence in everything if sequence in set(kept)] == kept  # in their order, and nothing new
    forward = [sequence for sequence in dropped if sequence[4] > 0]
    # Of 160 kb, 70 kb are copies; those of a, b and c that were cut off at an edge of a region or unit may stay.
    lost = sum(end - start for _, _, start, end, _, _ in forward)
    assert 0.9 * 70_000 < lost <= 70_000 + 300
    contigs = {contig for _, contig, *_ in dropped}
    assert 3 not in contigs and not any(contig == 2 and start > 30_100 for _, contig, start, *_ in dropped)
    assert all(split == "train" or any(other[0] == "valid" for other in kept) for split, *_ in dropped)
    manifest, before = Dataset(tmp_path / "near").manifest, totals(tmp_path / "all")
    after = totals(tmp_path / "near")
    assert before["kept"] - after["kept"] == lost == after["near_duplicate"] + after["duplicate"]
    assert manifest["duplicates"]["near"] + manifest["duplicates"]["exact"] == len(forward)
    table = manifest["duplicates"]["from"]
    assert sum(row["near"] + row["exact"] for row in table) == len(forward)
    assert {(row["species"], row["kept_in"]) for row in table} <= {(a, b) for a in "abc" for b in "abc"}
    if strands == "both":  # the other strand of what is gone goes too, by the place of its middle
        lost = {each[1:] for each in dropped}
        for split, contig, start, end, strand, tokens in everything:
            if strand < 0:
                before = [each for each in everything if each[:2] == (split, contig) and each[4] > 0]
                holder = max((each for each in before if each[2] <= (start + end) // 2), key=lambda each: each[2])
                assert ((contig, start, end, strand, tokens) in lost) == (holder[1:] in lost)


def test_copies_in_truncated_pieces_go_on_both_strands(copies: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    genomes = tmp_path / "genomes"
    genomes.mkdir()
    for name in ("one", "two"):
        (genomes / f"{name}.fa").write_bytes((copies / "a.fa").read_bytes())
    options = ["--strands", "both", "--packing", "paper", "--valid-fraction", "0"]
    assert command(genomes, tokenizer_file, tmp_path / "out", *options) == 0
    found = list(sequences(tmp_path / "out"))
    assert {contig for _, contig, *_ in found} == {0}
    assert sum(each[4] > 0 for each in found) == sum(each[4] < 0 for each in found) >= BASES // 1000


def test_exact_copies_only(copies: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    genomes = tmp_path / "genomes"
    genomes.mkdir()
    text = (copies / "a.fa").read_bytes()
    (genomes / "one.fa").write_bytes(text)
    (genomes / "two.fa").write_bytes(text.lower())
    (genomes / "three.fa").write_bytes((copies / "b.fa").read_bytes())
    assert command(genomes, tokenizer_file, tmp_path / "out", "--duplicates", "exact", "--valid-fraction", "0") == 0
    rows = {row["name"]: row for row in Dataset(tmp_path / "out").manifest["species"]}
    assert rows["two"]["bases"]["kept"] == 0 and rows["two"]["sequences"] == {"train": 0, "valid": 0}
    assert rows["two"]["bases"]["dropped"]["duplicate"] == rows["one"]["bases"]["kept"] > 0.99 * BASES
    assert rows["three"]["bases"]["dropped"]["duplicate"] == 0
    assert len({row["shard"] for row in Dataset(tmp_path / "out").split("train").shards}) < 9  # emptied shards are gone
    assert not (tmp_path / "out/train/000006.tar").exists()


def exclusion_list(path: Path, stretches: list[tuple[str, int, int]]) -> Path:
    lines = [f"{file}\t0\t{file[0]}\t{BASES}\t{start}\t{end}\tGUE/tf/0\n" for file, start, end in stretches]
    path.write_text("file\trecord\tcontig\tlength\tstart\tend\tagainst\n" + "".join(lines))
    return path


@pytest.mark.parametrize("strands", ["forward", "both"])
def test_an_exclusion_list_is_honoured(
    copies: Path, tokenizer_file: Path, tmp_path: Path, strands: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stretches = [("a.fa", 5000, 5040), ("d.fa", 100, 2000), ("d.fa", 39_990, 40_000)]
    listed = exclusion_list(tmp_path / "excluded.tsv", stretches)
    options = ["--strands", strands, "--duplicates", "none"]
    assert command(copies, tokenizer_file, tmp_path / "all", *options) == 0
    assert command(copies, tokenizer_file, tmp_path / "less", *options, "--exclude", str(listed)) == 0

    def hit(contig: int, start: int, end: int) -> bool:
        return any("abcd"[contig] == file[0] and start < stop and first < end for file, first, stop in stretches)

    kept = list(sequences(tmp_path / "less"))
    assert kept == [each for each in sequences(tmp_path / "all") if not hit(*each[1:4])]
    dropped = [each for each in sequences(tmp_path / "all") if hit(*each[1:4])]
    manifest = Dataset(tmp_path / "less").manifest
    sha256 = hashlib.sha256(listed.read_bytes()).hexdigest()
    assert manifest["excluded"] == {"sha256": sha256, "sequences": len(dropped)} and dropped
    assert totals(tmp_path / "less")["excluded"] == sum(end - start for _, _, start, end, strand, _ in dropped if strand > 0)
    assert run(["finalize", str(tmp_path / "less"), "--exclude", str(listed)]) == 0  # done
    assert run(["finalize", str(tmp_path / "all"), "--exclude", str(listed)]) == 2
    assert "is finished, without --exclude" in capsys.readouterr().err


def test_what_is_excluded_makes_no_duplicates(copies: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    """Of two copies one is excluded: the other stays, although it comes later."""
    genomes = tmp_path / "genomes"
    genomes.mkdir()
    for name in ("a", "b"):
        (genomes / f"{name}.fa").write_bytes((copies / "a.fa").read_bytes())
    listed = exclusion_list(tmp_path / "excluded.tsv", [("a.fa", 0, 20_000)])
    listed.write_text(listed.read_text().replace("\tb\t", "\ta\t"))
    options = ["--valid-fraction", "0", "--exclude", str(listed)]
    assert command(genomes, tokenizer_file, tmp_path / "out", *options) == 0
    a, b = (row["bases"] for row in Dataset(tmp_path / "out").manifest["species"])
    assert a["kept"] == pytest.approx(20_000, abs=400) and b["kept"] == pytest.approx(20_000, abs=400)
    assert b["dropped"]["duplicate"] == pytest.approx(20_000, abs=400) and b["dropped"]["excluded"] == 0
    places = sorted((start, end) for _, _, start, end, _, _ in sequences(tmp_path / "out"))
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(places))  # each base once


class Dies(Exception):
    pass


def test_killed_while_removing_it_goes_on(
    copies: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = exclusion_list(tmp_path / "excluded.tsv", [("d.fa", 100, 20_000)])
    assert command(copies, tokenizer_file, tmp_path / "whole", "--exclude", str(listed)) == 0
    out, task = tmp_path / "killed", ["--num-tasks", "1", "--task", "0"]
    assert command(copies, tokenizer_file, out, *task) == 0
    original, calls = os.replace, 0

    def replace(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in died:
            raise Dies
        original(*args)

    died, lives = set[int](), 0
    monkeypatch.setattr(building.os, "replace", replace)
    for number in range(1, 99):  # dies before a rename, each second life a little later
        died, lives = {calls + number // 2 + 1}, lives + 1
        if run(["finalize", str(out), "--exclude", str(listed)]) == 0:
            break
        assert not (out / "manifest.json").exists()
        if number == 12:  # somebody starts the array again in between
            assert command(copies, tokenizer_file, out, *task) == 0
            other = exclusion_list(tmp_path / "other.tsv", [("d.fa", 100, 300)])
            died = set()
            assert run(["finalize", str(out), "--exclude", str(other)]) == 2
            assert "begun with another --exclude, or without" in capsys.readouterr().err
    assert 10 < lives < 90
    assert tree(out) == tree(tmp_path / "whole")


def test_tasks_make_no_difference(copies: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    assert command(copies, tokenizer_file, tmp_path / "whole", "--strands", "both") == 0
    out = tmp_path / "tasks"
    for task in (4, 0, 3, 1, 2):
        assert command(copies, tokenizer_file, out, "--strands", "both", "--num-tasks", "5", "--task", str(task)) == 0
    for task in (1, 0):
        assert run(["finalize", str(out), "--num-tasks", "2", "--task", str(task)]) == 0
    assert run(["finalize", str(out)]) == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_every_removed_sequence_is_accounted_for_in_the_tables(copies: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    assert command(copies, tokenizer_file, tmp_path / "out") == 0
    dataset = Dataset(tmp_path / "out")
    found = list(sequences(tmp_path / "out"))
    for name in SPLITS:
        mine = [each for each in found if each[0] == name]
        assert dataset.manifest["splits"][name]["sequences"] == len(mine)
        assert dataset.manifest["splits"][name]["tokens"] == sum(len(each[5]) // 2 for each in mine)
        assert dataset.split(name).shards["sequences"].sum() == len(mine)
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["duplicates_removed"] == "near"
    assert np.isclose(sum(row["weight"] for row in dataset.manifest["species"]), 1)
