"""A whole dataset passes; each kind of damage is found and named, also where all sums are right."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.__main__ import run
from data_prep.dataset import SHARD_ROW, Dataset, ShardWriter, npy_bytes
from data_prep.inputs.genomes import REGION_BASES
from data_prep.storage import file_sha256
from data_prep.tokenizing import train as tokenizer
from data_prep.tokenizing.kmer_tokenizer import kmer_json
from data_prep.verify.shard import Rules, check_shards
from data_prep.verify.source import BasesInOrder
from tests.data_prep.conftest import random_bases

Shard = Callable[..., int]
Verify = Callable[..., list[str]]
Sequence = tuple[np.ndarray, int, int, int]  # tokens, contig, start, strand


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """`verify(dataset, *options)` runs the command; the problems it names, [] for a dataset that is whole."""

    def command(path: Path, *options: str) -> list[str]:
        capsys.readouterr()
        status = run(["verify", str(path), "--processes", "1", *options])
        *lines, last = capsys.readouterr().err.splitlines()
        named = [line for line in lines if ": read " not in line and " compared with " not in line]
        assert status == (2 if named else 0)
        expected = f"error: {path}: {len(named)} problem" if named else f"{path}: whole"
        assert expected in last
        return named

    return command


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A dataset to be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))


def seal(path: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make all sums right again, and the manifest after `change`."""
    for split in ("train", "valid"):
        table = np.load(path / split / "shards.npy")
        for row in table:
            tar = path / split / f"{row['shard']:06d}.tar"
            data, index = tar.read_bytes(), np.load(tar.with_suffix(".index.npy"))
            for block in index:
                block["crc32"] = zlib.crc32(data[block["offset"] : block["offset"] + block["size"]])
            tar.with_suffix(".index.npy").write_bytes(npy_bytes(index))
            row["bytes"], row["sha256"] = len(data), np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            row["index_sha256"] = np.frombuffer(hashlib.sha256(npy_bytes(index)).digest(), np.uint8)
        (path / split / "shards.npy").write_bytes(npy_bytes(table))
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    manifest["files"] = {name: file_sha256(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def sequences(path: Path, split: str, row: int) -> Iterator[Sequence]:
    opened = Dataset(path).split(split)
    for number in range(len(opened.blocks(row))):
        block = opened.read_block(row, number)
        for position, source in enumerate(block.source.tolist()):
            yield (block.sequence(position), *source)


def rewrite(path: Path, split: str, row: int, content: list[Sequence]) -> None:
    """Put other sequences into a shard, with every sum and count right."""
    table = np.load(path / split / "shards.npy")
    writer = ShardWriter(path / split, int(table["shard"][row]), int(table["species"][row]))
    for sequence in content:
        writer.add(*sequence)
    new = writer.close()
    assert new is not None
    table[row] = new
    (path / split / "shards.npy").write_bytes(npy_bytes(table))

    def count(manifest: dict[str, Any]) -> None:
        for key in ("blocks", "sequences", "tokens"):
            manifest["splits"][split][key] = int(table[key].sum())
        for number, species in enumerate(manifest["species"]):
            for key in ("sequences", "tokens"):
                species[key][split] = int(table[key][table["species"] == number].sum())
        for species in manifest["species"]:
            species["weight"] = species["tokens"]["train"] / manifest["splits"]["train"]["tokens"]

    seal(path, count)


def test_a_whole_dataset_passes(
    dataset: Path, genomes: Path, verify: Verify, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(dataset) == []
    assert verify(dataset, "--genomes", str(genomes)) == []
    seal(copy)
    assert verify(copy) == []  # `seal` tells no lies of its own
    assert run(["verify", str(dataset), "--genomes", str(genomes), "--processes", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = Dataset(dataset).manifest
    assert result["bases"] == sum(row["bases"]["kept"] for row in manifest["species"])
    assert result["sequences"] == sum(split["sequences"] for split in manifest["splits"].values())
    assert result["sources"]["sequences"] == result["sequences"]
    assert result["sources"]["sequence_bases"] == result["bases"]
    assert result["sources"]["bases"] == sum(row["bases"]["in"] for row in manifest["species"])
    tars = [*dataset.glob("*/*.tar")]
    assert (result["shards"], result["bytes"]) == (len(tars), sum(tar.stat().st_size for tar in tars))


def test_both_strands_pass(shard: Shard, genomes: Path, tmp_path: Path, verify: Verify) -> None:
    assert shard(tmp_path / "both", "--strands", "both", "--duplicates", "none", "--processes", "1") == 0
    assert verify(tmp_path / "both", "--genomes", str(genomes)) == []
    seal(tmp_path / "both", lambda manifest: manifest.update(strands="forward"))
    assert all("strand -1" in problem for problem in verify(tmp_path / "both"))


@pytest.mark.parametrize(("kind", "packing"), [("kmer", "paper"), ("overlapping-kmer", "contiguous")])
def test_every_kind_of_data_passes(kind: str, packing: str, genomes: Path, tmp_path: Path, verify: Verify) -> None:
    (tmp_path / "kmers.json").write_bytes(kmer_json(kind, 3))
    options = ["--genomes", str(genomes), "--tokenizer", str(tmp_path / "kmers.json"), "--sequence-length", "64"]
    options += ["--region-bases", "2000", "--unit-bases", "7000", "--valid-fraction", "0.2", "--strands", "both"]
    out = tmp_path / "out"
    assert run(["shard", "--out", str(out), *options, "--packing", packing, "--duplicates", "none", "--processes", "1"]) == 0
    assert verify(out, "--genomes", str(genomes)) == []


@pytest.mark.parametrize(
    ("file", "offset", "words"),
    [
        ("tokenizer.json", 9, "sha256 differs"),
        ("train/contigs.tsv", -2, "sha256 differs"),
        ("valid/shards.npy", -9, "sha256 differs"),
        ("train/000002.index.npy", -9, "sha256 differs"),
        ("train/000002.tar", 700, "block 0 at offset 0: crc32 differs"),
        ("train/000002.tar", -1, "not a tar's end marker"),
    ],
)
def test_a_flipped_byte_is_found(copy: Path, verify: Verify, file: str, offset: int, words: str) -> None:
    flip(copy / file, offset % (copy / file).stat().st_size)
    (problem,) = verify(copy)
    assert problem.startswith(f"{copy / file}: ") and words in problem


def test_every_byte_of_a_shard_counts(copy: Path, verify: Verify) -> None:
    size = (copy / "valid/000003.tar").stat().st_size if (copy / "valid/000003.tar").is_file() else 0
    tar = copy / "valid/000003.tar" if size else next(iter(sorted((copy / "valid").glob("*.tar"))))
    for offset in range(0, tar.stat().st_size, 499):
        flip(tar, offset)
        (problem,) = verify(copy)
        assert problem.startswith(f"{tar}: ")
        flip(tar, offset)
    assert verify(copy) == []


def test_cut_missing_swapped_and_unknown_files(copy: Path, verify: Verify) -> None:
    train = copy / "train"
    whole = {path: path.read_bytes() for path in train.iterdir()}
    index, tar, other = train / "000002.index.npy", train / "000002.tar", train / "000001.index.npy"

    def problems() -> list[str]:
        found = verify(copy)
        for path, data in whole.items():
            path.write_bytes(data)
        return found

    tar.write_bytes(whole[tar][:1500])
    assert problems() == [f"{tar}: 1500 bytes instead of {len(whole[tar])}, truncated in block 0 of 1"]
    tar.write_bytes(whole[tar][:-100])
    assert problems() == [f"{tar}: {len(whole[tar]) - 100} bytes instead of {len(whole[tar])}, its end marker is missing"]
    tar.write_bytes(whole[tar] + bytes(512))
    assert problems() == [f"{tar}: {len(whole[tar]) + 512} bytes instead of {len(whole[tar])}"]
    tar.unlink()
    assert problems() == [f"{tar}: not found"]
    index.unlink()
    assert problems() == [f"{index}: not found"]
    index.write_bytes(whole[other])
    other.write_bytes(whole[index])
    assert [problem.split(";")[0] for problem in problems()] == [
        f"{path}: sha256 differs from the recorded one" for path in (other, index)
    ]
    tar.write_bytes(whole[train / "000001.tar"])
    assert problems()[0].startswith(f"{tar}: ")
    strange = [train / ".000001.tar.x.partial", train / "000099.tar", train / "2.tar", copy / "notes.txt", copy / ".work"]
    for path in strange:
        path.write_bytes(b"")
    assert sorted(problems()) == sorted(f"{path}: not part of the dataset; remove it" for path in strange)


def test_a_foreign_tokenizer_is_found(copy: Path, genomes: Path, tmp_path: Path, verify: Verify) -> None:
    tokenizer.train(genomes, tmp_path / "other.json", vocab_size=150)
    (copy / "tokenizer.json").write_bytes((tmp_path / "other.json").read_bytes())
    (problem,) = verify(copy)
    assert problem.startswith(f"{copy / 'tokenizer.json'}: a foreign tokenizer (bpe, 150 tokens): sha256 differs")

    def admit(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"] |= {"sha256": file_sha256(copy / "tokenizer.json"), "vocab_size": 150}

    seal(copy, admit)  # the manifest says that it is the right one
    found = verify(copy)
    assert len(found) == len(list(copy.glob("*/*.tar")))
    assert all("is not of the tokenizer, which has 150" in problem for problem in found)
    (copy / "tokenizer.json").write_bytes(b"{}")
    seal(copy)
    assert "no tokenizer" in verify(copy)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["splits"]["train"].update(sequences=7), "splits.train.sequences is 7, but in shards.npy"),
        (lambda m: m["splits"]["valid"].update(shards=0), "splits.valid.shards is 0"),
        (lambda m: m["species"][1]["tokens"].update(valid=5), "species coli: tokens.valid is 5"),
        (lambda m: m["species"][1].update(weight=0.5), "species coli: weight"),
        (lambda m: m["species"][1].update(first_contig=3), "species coli: first_contig is 3, but 1 contigs"),
        (lambda m: m["species"][1]["bases"].update({"in": 1}), "species coli: bases in are not"),
        (lambda m: m["tokenizer"].update(kind="kmer"), "tokenizer.kind is kmer, that of tokenizer.json is bpe"),
        (lambda m: m["duplicates"].update(near=10**6), "duplicates.near is 1000000"),
        (lambda m: m["tokenizer"].update(k=6), "tokenizer.k is 6, that of tokenizer.json is None"),
        (lambda m: m.update(run_bases=8190), "run_bases is 8190, but 8192 with tokenizer.json"),
        (lambda m: m.update(minimum_tokens=5), "minimum_tokens is 5, but sequences are made of 8 tokens or more"),
        (lambda m: m["order"].update(streams=10**6), "order.streams is 1000000, not from 1 to the "),
        (lambda m: m["order"].update(streams=0), "order.streams is 0, not from 1 to the "),
        (lambda m: m["order"].update(streams="8"), "lacks a key or holds a wrong value (TypeError"),
        (lambda m: m["duplicates"].update({"exact": 0, "near": 0, "from": []}), "duplicates.exact is 0, but 2803 bases"),
        (lambda m: m["duplicates"].update({"exact": 0, "near": 0, "from": []}), "duplicates.near is 0, but 352 bases"),
        (
            lambda m: m["species"][0]["bases"]["dropped"].update(near_duplicate=0, short_tail=382),
            "duplicates.near is 6, but 0 bases were dropped as near_duplicate",
        ),
        (lambda m: m.update(duplicates_removed="none"), "duplicates.exact is 47, but duplicates_removed is none"),
        (lambda m: m.update(duplicates_removed="exact"), "duplicates.near is 6, but duplicates_removed is exact"),
        (lambda m: m.update(excluded={"sha256": "0" * 64, "sequences": 3}), "excluded.sequences is 3, but 0 bases were"),
        (
            lambda m: [m.pop(key) for key in ("duplicates", "strands")],
            "made by an earlier version (no `strands`, `duplicates`); shard again",
        ),
        (lambda m: m["files"].update(more="0" * 64), "has the sum of 'more'"),
        (lambda m: m["species"][1].pop("bases"), "lacks a key or holds a wrong value (KeyError('bases'))"),
        (lambda m: m.update(format_version=2), "format_version 2"),
        (lambda m: m.update(strands="sideways"), "lacks a key or holds a wrong value (TypeError"),
        (lambda m: m.update(packing="tight"), "lacks a key or holds a wrong value (TypeError"),
        (lambda m: m.update(sequence_length="128"), "lacks a key or holds a wrong value (TypeError"),
    ],
)
def test_an_edited_manifest_does_not_add_up(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], None], words: str
) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert run(["verify", str(copy), "--processes", "1"]) == 2
    assert f"{path}: {words}" in capsys.readouterr().err


def test_bases_kept_are_those_that_sequences_cover(copy: Path, verify: Verify) -> None:
    def move(manifest: dict[str, Any]) -> None:
        bases = manifest["species"][2]["bases"]
        bases["kept"] -= 10
        bases["dropped"]["short_tail"] += 10

    seal(copy, move)
    (problem,) = verify(copy)
    assert "species thale: " in problem and "but its sequences cover" in problem


def test_contigs_must_be_those_of_the_manifest(copy: Path, verify: Verify) -> None:
    path = copy / "train/contigs.tsv"
    lines = path.read_text().splitlines(keepends=True)
    for changed, words in (
        (lines[:-1], "is missing"),
        ([*lines, lines[-1].replace("12", "13", 1)], "no more contigs"),
        ([*lines[:2], *lines[3:4], *lines[2:3], *lines[4:]], "line 3 is 2 "),
        (lines[1:], "not a table of contigs"),
    ):
        path.write_text("".join(changed))
        seal(copy)
        assert words in verify(copy)[0]


def change(row: int, **values: int) -> Callable[[list[Sequence]], list[Sequence]]:
    def changed(content: list[Sequence]) -> list[Sequence]:
        tokens, contig, start, strand = content[row]
        place = {"contig": contig, "start": start, "strand": strand} | values
        return [*content[:row], (tokens, *place.values()), *content[row + 1 :]]

    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change(2, start=10**9), "block 0 at offset 0: sequence 2: reaches beyond its contig; start 1000000000"),
        (change(2, start=-1), "sequence 2: reaches beyond its contig; start -1"),
        (change(2, contig=10**6), "sequence 2: its species has the contigs"),
        (change(2, contig=0), "sequence 2: its species has the contigs"),
        (change(2, strand=0), "sequence 2: strand 0"),
        (change(2, strand=-1), "sequence 2: strand -1"),
        (lambda content: [*content, content[5]], "1 sequences of strand 1 overlap the one before; the first is at contig"),
        (
            lambda content: [*content, (np.full(30, 9, np.uint16), *content[5][1:])],
            "length in tokens is not 8 to 18, but 30",
        ),
        (lambda content: [(np.array([2, *[9] * 8], np.uint16), *content[0][1:])], "stands for no bases; first token 2"),
        (
            lambda content: [(content[0][0][:7], *content[0][1:]), *content[1:]],
            "sequence 0: length in tokens is not 8 to 18",
        ),
    ],
)
def test_nonsense_with_right_sums_is_found(
    copy: Path, verify: Verify, change: Callable[[list[Sequence]], list[Sequence]], words: str
) -> None:
    row = len(np.load(copy / "train/shards.npy")) - 1
    rewrite(copy, "train", row, change(list(sequences(copy, "train", row))))
    problems = verify(copy)
    assert problems[0].startswith(f"{copy}/train/0000") and words in problems[0]


def test_a_leak_between_the_splits_is_found(copy: Path, verify: Verify) -> None:
    valid, train = np.load(copy / "valid/shards.npy"), np.load(copy / "train/shards.npy")
    row = int(np.flatnonzero(train["species"] == valid["species"][0])[0])
    leaked = next(sequences(copy, "valid", 0))
    rewrite(copy, "train", row, [*sequences(copy, "train", row), leaked])
    (problem,) = [each for each in verify(copy) if "manifest.json" not in each]
    assert "train/" in problem and "valid/" in problem and "too" in problem


def test_the_tar_must_be_as_documented(copy: Path, verify: Verify) -> None:
    tar = copy / "train/000002.tar"
    whole = tar.read_bytes()

    def written(**changes: Any) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(whole)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
            for member in old:
                stream = old.extractfile(member)
                assert stream is not None
                data = stream.read()
                for key, value in changes.items():
                    setattr(member, key, value(member.name))
                new.addfile(member, io.BytesIO(data))
        return buffer.getvalue()

    for data, words in (
        (written(mtime=lambda name: 1), "is no plain file with mtime 0"),
        (written(name=lambda name: name.replace("tokens", "bytes")), "has the members"),
        (whole.replace(b"'<i8'", b"'<u8'"), "000002-000000.source.npy is uint64, not int64"),
        (whole.replace(b"NUMPY", b"NUMPI"), "is not a .npy array"),
        (whole.replace(b"lengths.npy", b"lengths.npz"), "is not a tar"),
    ):
        assert len(data) == len(whole) and data != whole
        tar.write_bytes(data)
        seal(copy)
        (problem,) = verify(copy)
        assert problem.startswith(f"{tar}: block 0 at offset 0: ") and words in problem
    tar.write_bytes(whole)
    index = np.load(tar.with_suffix(".index.npy"))
    index["offset"] += 512
    tar.with_suffix(".index.npy").write_bytes(npy_bytes(index))
    seal(copy)
    assert "do not lie one after the other" in verify(copy)[0]


def test_blocks_are_named_and_many_problems_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    writer = ShardWriter(tmp_path / "train", 7, 0)
    for number in range(9 * 1024 + 1):
        writer.add(np.full(9, 6, np.uint16), 0, 9 * number)
    rows = np.array([writer.close()], SHARD_ROW)
    bases = np.ones(7, np.int64)
    rules = Rules(9, 126, 7, (1,), bases, 0, 0, 1, np.array([0, 9 * 9 * 1024 + 9 + 1]))
    (found,) = check_shards(tmp_path, "train", rows, rules)
    assert found.problems == [] and found.bases == 9 * (9 * 1024 + 1)
    assert found.runs is not None and found.runs.tolist() == [[0, found.bases]]
    tar = tmp_path / "train/000007.tar"
    offsets = np.load(tar.with_suffix(".index.npy"))["offset"].tolist()
    flip(tar, offsets[4] + 600)
    (found,) = check_shards(tmp_path, "train", rows, rules)
    assert found.problems == [f"{tar}: block 4 at offset {offsets[4]}: crc32 differs from the recorded one"]
    assert found.runs is None
    for offset in offsets:
        flip(tar, offset + 700)
    (found,) = check_shards(tmp_path, "train", rows, rules)
    assert len(found.problems) == 5 and found.unlisted == 5
    tar.write_bytes(tar.read_bytes()[: offsets[3] + 1])
    (found,) = check_shards(tmp_path, "train", rows, rules)
    assert "truncated in block 3 of 10" in found.problems[0]


def test_bases_are_read_in_order_and_across_regions(tmp_path: Path) -> None:
    records = [random_bases(1, 3 * REGION_BASES // 2), b"", random_bases(2, 100), random_bases(3, 2 * REGION_BASES + 7)]
    (tmp_path / "x.fa").write_bytes(b"".join(b">r\n%s\n" % record for record in records))
    reader, edge = BasesInOrder(tmp_path / "x.fa", first_contig=40), REGION_BASES
    for contig, start, size in (
        (40, 0, 30),
        (40, 10, 30),  # overlaps the one before
        (40, edge - 5, 10),
        (40, edge - 5, 20),
        (40, len(records[0]) - 3, 3),
        (42, 90, 10),
        (43, 5, 1),
        (43, 2 * edge - 1, 8),
    ):
        assert reader.at(contig, start, size) == records[contig - 40][start : start + size]
    assert len(reader.at(43, len(records[3]) - 3, 10)) < 10
    assert reader.at(43, 4, 1) == b"" == reader.at(42, 0, 1)  # passed already
    assert reader.at(44, 0, 1) == b""
    reader.finish()
    assert reader.bases == sum(map(len, records))
    assert reader.digest.hexdigest() == file_sha256(tmp_path / "x.fa")


def test_genomes_that_changed_are_found(dataset: Path, genomes: Path, tmp_path: Path, verify: Verify) -> None:
    root = Path(shutil.copytree(genomes, tmp_path / "genomes"))
    path = root / "root.fa"
    text = path.read_bytes()
    path.write_bytes(text[:5000] + (b"A" if text[5000:5001] != b"A" else b"C") + text[5001:])
    problems = verify(dataset, "--genomes", str(root))
    assert len(problems) == 2
    assert "0.tar: block 0, sequence" in problems[0] or "block 0, sequence" in problems[0]
    assert f"is not what stands in {path}, contig " in problems[0]
    assert problems[1] == f"{path}: sha256 differs from that of the file the dataset was made of"
    path.write_bytes(text[:3] + b"GA" + text[3:])  # all moved on
    problems = verify(dataset, "--genomes", str(root))
    assert len(problems) == 5 and "more sequences of root" in problems[3]
    path.write_bytes(text.replace(b">r", b">renamed"))
    assert [problem.split("; ")[1] for problem in verify(dataset, "--genomes", str(root))] == [
        "its sequences are still the same"
    ]
    path.write_bytes(text[:-2000])
    assert f"{path}: sha256 differs" in verify(dataset, "--genomes", str(root))[-1]
    path.unlink()
    assert verify(dataset, "--genomes", str(root)) == [f"{path}: not found, but root was made of it"]


def test_genomes_are_not_compared_with_damage(copy: Path, genomes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "train/000002.tar", 700)
    assert run(["verify", str(copy), "--genomes", str(genomes), "--processes", "1"]) == 2
    assert f"{genomes}: not compared with a dataset that is damaged" in capsys.readouterr().err


def test_what_cannot_be_verified(shard: Shard, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path / "begun", "--num-tasks", "2", "--task", "0") == 0
    for path, words in (
        (tmp_path / "begun", "is not finished; run its tasks"),
        (tmp_path / "none", "no such directory"),
        (tmp_path, "manifest.json: not found"),
        ("s3://bucket/dataset", "run it on a directory"),
    ):
        assert run(["verify", str(path)]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert run(["verify", str(dataset), "--genomes", str(tmp_path / "none")]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert run(["verify", str(dataset), "--processes", "0"]) == 2


def test_problems_are_listed_up_to_a_bound(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(120):
        (copy / f"stray-{number}").touch()
    assert run(["verify", str(copy), "--processes", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("not part of the dataset" in line for line in lines) == 100
    assert "... and 20 more problems" in lines and "120 problems" in lines[-1]
