"""The audit against a plain search of the text of the training data, and what excluding its findings leaves."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import run
from data_prep.audit.evaluations import read_evaluation
from data_prep.audit.exclusions import read_exclusions
from data_prep.codec import Codec
from data_prep.dataset import SHARD_ROW, Dataset, ShardWriter, npy_bytes
from data_prep.kmers import reverse_complement
from data_prep.tokenizing import train as tokenizer
from tests.data_prep.conftest import random_bases, wrapped

# Sequences of some 100 bases, so that every other window of 50 lies over an edge of two; blocks of 1,024; three shards.
OPTIONS = ["--sequence-length", "40", "--unit-bases", "150000", "--valid-fraction", "0"]
Run = tuple[int, int, bytes]  # contig, start, bases


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Genomes without repeats, a tokenizer, and a dataset of both strands."""
    root = tmp_path_factory.mktemp("audit")
    (root / "genomes/plant").mkdir(parents=True)
    text = bytearray(random_bases(11, 300_000))
    text[98_500:98_520] = b"N" * 20
    (root / "genomes/plant/cress.fa").write_bytes(
        b">one\n" + random_bases(12, 5000) + b"\n>two\n" + wrapped(bytes(text), 70)
    )
    (root / "genomes/virus.fa").write_bytes(b">v\n" + random_bases(13, 30_000) + b"\n")
    tokenizer.train(root / "genomes", root / "tokenizer.json", vocab_size=100)
    shard(root, root / "dataset")
    return root


def shard(data: Path, out: Path, *options: str) -> None:
    where = ["--genomes", str(data / "genomes"), "--tokenizer", str(data / "tokenizer.json"), "--out", str(out)]
    assert run(["shard", *where, *OPTIONS, *options]) == 0


def runs_of(dataset: Path) -> list[Run]:
    """The training text: sequences that follow each other joined, one at a time."""
    whole = Dataset(dataset)
    split, codec = whole.split("train"), Codec(whole.tokenizer_path)
    sequences = []
    for row in range(len(split.shards)):
        for number in range(len(split.blocks(row))):
            block = split.read_block(row, number)
            for each, (contig, start, strand) in enumerate(block.source.tolist()):
                text = codec.decode(block.sequence(each))
                sequences.append((contig, strand, start, text if strand > 0 else reverse_complement(text)))
    runs: list[tuple[int, int, int, list[bytes]]] = []
    end = -1
    for contig, strand, start, text in sorted(sequences):
        if not runs or (contig, strand, start) != (*runs[-1][:2], end):
            runs.append((contig, strand, start, []))
        runs[-1][3].append(text)
        end = start + len(text)
    return [(contig, start, b"".join(parts)) for contig, _, start, parts in runs]


def write_set(folder: Path, sequences: list[bytes], part: str = "test") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{sequence.decode()},{number % 2}\n" for number, sequence in enumerate(sequences))
    (folder / f"{part}.csv").write_text("sequence,label\n" + rows)


def audit(dataset: Path, against: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert run(["audit", str(dataset), "--against", str(against), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def at(runs: list[Run], start: int, end: int) -> bytes:
    """The training text of this stretch of contig 1."""
    for contig, first, text in runs:
        if contig == 1 and first <= start and end <= first + len(text):
            return text[start - first : end - first]
    raise AssertionError(f"{start} to {end} is no training text")


def places(runs: list[Run]) -> list[int]:
    """Starts in contig 1, 1,000 bases apart, at which 300 bases are training text."""
    return [place for contig, start, text in runs if contig == 1 for place in range(start, start + len(text) - 300, 1000)]


def plainly(runs: list[Run], sequences: list[bytes], length: int) -> tuple[int, int]:
    """How many sequences have a stretch in the training text, and how many of their bases lie in one."""
    texts = [text for _, _, bases in runs for text in (bases, reverse_complement(bases))]
    there = {text[start : start + length] for text in texts for start in range(len(text) - length + 1)}
    matched = bases = 0
    for sequence in sequences:
        covered: set[int] = set()
        for start in range(len(sequence) - length + 1):
            if sequence[start : start + length] in there:
                covered.update(range(start, start + length))
        matched, bases = matched + bool(covered), bases + len(covered)
    return matched, bases


def plain_places(runs: list[Run], sequences: list[bytes], length: int) -> set[tuple[str, int]]:
    """Contig name and position of every training base in a stretch that a sequence has."""
    texts = [text for sequence in sequences for text in (sequence, reverse_complement(sequence))]
    wanted = {text[start : start + length] for text in texts for start in range(len(text) - length + 1)}
    found: set[tuple[str, int]] = set()
    for contig, first, text in runs:
        for start in range(len(text) - length + 1):
            if text[start : start + length] in wanted:
                found.update((("one", "two", "v")[contig], first + start + base) for base in range(length))
    return found


def other(base: int) -> bytes:
    return b"C" if base == ord("A") else b"A"


def edges(dataset: Path) -> tuple[int, int]:
    """In the longest contig, where a sequence that ends a block, and one that ends a shard, is followed by another."""
    whole = Dataset(dataset)
    split, codec = whole.split("train"), Codec(whole.tokenizer_path)
    ends = []
    for row in range(len(split.shards)):
        for number in range(len(split.blocks(row))):
            block = split.read_block(row, number)
            spans = codec.spans(block.tokens, block.lengths)
            ends.append((row, block.source[0].tolist(), (block.source[-1] + [0, spans[-1], 0]).tolist()))
    places = [(row, after[1], row == row_after) for (row, _, end), (row_after, after, _) in pairwise(ends) if end == after]
    return (
        next(place for _, place, same_shard in places if same_shard),
        next(place for _, place, same_shard in places if not same_shard),
    )


def test_planted_copies(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = data / "dataset"
    runs = runs_of(dataset)
    free = iter(places(runs))
    text = {name: at(runs, place, place + 300) for name, place in zip("abcdefghij", free, strict=False)}
    block_edge, shard_edge = edges(dataset)
    mutated, near = bytearray(text["d"][:99]), bytearray(text["d"][:100])
    mutated[49:50], near[49:50] = other(mutated[49]), other(near[49])
    planted = {
        "forward": (text["a"][:200], 200),
        "reverse complement": (reverse_complement(text["b"][:100]), 100),
        "inside": (
            text["c"][:160].translate(bytes.maketrans(b"ACGT", b"CATG"))[:50]
            + text["c"][50:110]
            + other(text["c"][110])
            + random_bases(2, 40),
            60,
        ),
        "one mismatch in the middle": (bytes(mutated), 0),  # 49 bases on either side
        "one mismatch, 50 behind it": (bytes(near), 50),
        "too short": (text["e"][:49], 0),
        "as short as can be": (text["e"][:50], 50),
        "two": (text["f"][:50] + b"N" + reverse_complement(text["g"][:55]), 105),
        "cut by N": (text["h"][:49] + b"N" + text["h"][50:99], 0),
        "lower case": (text["i"][:100].lower(), 100),
        "over the edge of two blocks": (at(runs, block_edge - 25, block_edge + 25), 50),
        "over the edge of two shards": (at(runs, shard_edge - 1, shard_edge + 49), 50),
        "over the gap of the genome": (at(runs, 98_451, 98_500) + at(runs, 98_520, 98_569), 0),  # 49 bases on either side
        "random": (random_bases(3, 1000), 0),
        "nothing but N": (b"N" * 60, 0),
    }
    for name, (sequence, _) in planted.items():
        write_set(tmp_path / "gue" / name.replace(" ", "_"), [sequence, random_bases(4, 100)])
    report, listed = tmp_path / "report.md", tmp_path / "exclusions.tsv"
    options = ["--out", str(report), "--exclusions", str(listed)]
    found = audit(dataset, tmp_path / "gue", *options, capsys=capsys)
    rows = {row["set"].replace("_", " "): row for row in found["sets"]}
    assert {name: row["covered"] for name, row in rows.items()} == {name: bases for name, (_, bases) in planted.items()}
    for name, (sequence, bases) in planted.items():
        assert (rows[name]["matched"], rows[name]["sequences"]) == (bool(bases), 2)
        assert rows[name]["bases"] == len(sequence) + 100
        assert rows[name]["too_short"] == (name in ("too short", "cut by N", "nothing but N"))
        assert rows[name]["from"] == ({"cress": 1} if bases else {})
    assert found["total"]["covered"] == sum(bases for _, bases in planted.values())
    assert found["training_sequences"] == Dataset(dataset).manifest["splits"]["train"]["sequences"]
    assert "| forward | test | 2 | 0 | 1 | 50.00 % | 300 | 200 | 66.67 % | cress 1 |" in report.read_text()
    # Each match stands in the list, at its place in the genome, with its sets.
    lines = [line.split("\t") for line in listed.read_text().splitlines()[1:]]
    assert {tuple(line[:4]) for line in lines} == {("plant/cress.fa", "1", "two", "300000")}
    listed_at = {line[6]: (int(line[4]), int(line[5])) for line in lines}
    first, second = places(runs)[:2]
    assert listed_at["forward"] == (first, first + 200)
    assert listed_at["reverse_complement"] == (second, second + 100)
    assert listed_at["over_the_edge_of_two_shards"] == (shard_edge - 1, shard_edge + 49)
    assert sum(int(line[5]) - int(line[4]) for line in lines) == found["stretch_bases"] == found["total"]["covered"]
    assert len(lines) == found["stretches"]


@pytest.mark.parametrize("length", [16, 32, 33, 50, 64])
def test_counts_are_those_of_a_plain_search(
    data: Path, tmp_path: Path, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, rng = runs_of(data / "dataset"), np.random.default_rng(length)
    sequences = []
    for _ in range(60):  # pieces of the training data with a few mutations, half of them turned around
        _, _, text = runs[rng.integers(0, len(runs))]
        start = rng.integers(0, max(1, len(text) - 120))
        piece = bytearray(text[start : start + 120])
        for place in rng.integers(0, len(piece), rng.integers(0, 5)):
            piece[place : place + 1] = other(piece[place])
        sequences.append(bytes(piece) if rng.integers(0, 2) else reverse_complement(bytes(piece)))
    sequences += [random_bases(seed, 300) for seed in range(200, 210)]
    write_set(tmp_path / "set", sequences)
    options = ["--match-bases", str(length), "--processes", "2" if length == 50 else "1"]
    found = audit(data / "dataset", tmp_path, *options, capsys=capsys)["total"]
    expected = plainly(runs, sequences, length)
    assert 10 < expected[0] < len(sequences)
    assert (found["matched"], found["covered"]) == expected


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--strands", "both"],
        ["--strands", "both", "--packing", "paper"],  # the strands keep other ends of a piece: one has bases the other lacks
    ],
)
def test_without_what_is_listed_nothing_is_left(
    data: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From an unfinished dataset the list names what to drop of the finished one; nothing else has a match."""
    begun, whole, gue = tmp_path / "begun", tmp_path / "whole", tmp_path / "gue"
    shard(data, begun, *options, "--num-tasks", "1", "--task", "0")
    shard(data, whole, *options)
    runs = runs_of(whole)
    sequences = [text[:130] for _, _, text in runs[::5]]
    write_set(gue / "all", [*sequences, random_bases(5, 200)])
    listed, again = tmp_path / "list.tsv", tmp_path / "again.tsv"
    found = audit(begun, gue, "--exclusions", str(listed), capsys=capsys)
    assert (found["total"]["matched"], found["total"]["covered"]) == plainly(runs, sequences, 50)
    assert found["total"]["matched"] == len(sequences) and found["units_missing"] == 0
    lines = [line.split("\t") for line in listed.read_text().splitlines()[1:]]
    bases = {(line[2], base) for line in lines for base in range(int(line[4]), int(line[5]))}
    assert bases == plain_places(runs, sequences, 50)
    audit(begun, gue, "--exclusions", str(again), "--processes", "2", capsys=capsys)
    assert again.read_bytes() == listed.read_bytes()
    dropped = drop(whole, listed)
    assert len(sequences) <= dropped <= len(sequences) * 8
    left = audit(whole, gue, capsys=capsys)
    assert left["total"]["matched"] == left["total"]["covered"] == left["stretches"] == 0
    assert left["training_sequences"] == found["training_sequences"] - dropped


def drop(dataset: Path, listed: Path) -> int:
    """Take out of a dataset the training sequences that a list hits; return how many."""
    whole = Dataset(dataset)
    split, codec = whole.split("train"), Codec(whole.tokenizer_path)
    exclusions, rows, dropped = read_exclusions(listed, whole.contigs_path), [], 0
    for row, shard in enumerate(np.array(split.shards)):
        blocks = [split.read_block(row, number) for number in range(len(split.blocks(row)))]
        writer = ShardWriter(dataset / "train", int(shard["shard"]), int(shard["species"]))
        for block in blocks:
            contig, start, _ = block.source.T
            hit = exclusions.hit(contig, start, start + codec.spans(block.tokens, block.lengths))
            dropped += int(hit.sum())
            for number in np.flatnonzero(~hit).tolist():
                writer.add(block.sequence(number), *block.source[number].tolist())
        rows.append(writer.close())
    table = npy_bytes(np.array(rows, dtype=SHARD_ROW))
    (dataset / "train/shards.npy").write_bytes(table)
    manifest = {
        **whole.manifest,
        "files": {**whole.manifest["files"], "train/shards.npy": hashlib.sha256(table).hexdigest()},
    }
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    return dropped


def test_pairs_parts_and_splits(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_of(data / "dataset")
    text = runs[-1][2]
    (tmp_path / "gue/EPI/cell").mkdir(parents=True)
    rows = [("enhancer", "promoter", "label", "note"), (random_bases(6, 90).decode(), text[:90].decode(), "1", "chr1")]
    rows += [(text[90:190].decode(), text[300:400].decode(), "0", "chr2"), (random_bases(7, 80).decode(), "ACGT", "0", "x")]
    with (tmp_path / "gue/EPI/cell/test.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    write_set(tmp_path / "gue/tf", [text[:60]], "dev")
    found = audit(data / "dataset", tmp_path / "gue", capsys=capsys)
    (pairs,) = found["sets"]
    assert (pairs["set"], pairs["sequences"], pairs["matched"], pairs["bases"]) == ("EPI/cell", 3, 2, 464)
    assert pairs["covered"] == 290 and pairs["from"] == {"virus": 2}
    found = audit(data / "dataset", tmp_path / "gue", "--parts", "dev", "test", capsys=capsys)
    assert [(row["set"], row["part"], row["matched"]) for row in found["sets"]] == [
        ("EPI/cell", "test", 2),
        ("tf", "dev", 1),
    ]
    # The folder itself may be a set; the validation split of this dataset is empty.
    found = audit(data / "dataset", tmp_path / "gue/tf", "--parts", "dev", "--split-of-data", "valid", capsys=capsys)
    assert (found["sets"][0]["set"], found["sets"][0]["matched"], found["training_bases"]) == ("tf", 0, 0)


def test_columns_are_chosen_by_many_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = random_bases(6, 40).decode(), random_bases(7, 40).decode()
    path = tmp_path / "test.csv"
    # The second of the first pair begins with codes of IUPAC, that of the second is not there.
    rows = [f"R{second[1:]}NYK,{first},1,backwards", f",{first},12345678,x", *[f"{second},{first},0,x"] * 200]
    path.write_text("\n".join(["sequence2,sequence1,label,note", *rows]) + "\n")
    found = read_evaluation(path, "pairs", "test")
    assert (found.sequences, found.bases) == (202, 202 * 40 + 201 * 40 + 3)
    assert f"{path}: searched for its columns sequence2, sequence1\n" in capsys.readouterr().err
    path.write_text(f"sequence,label\nRYRYRYRYRY,0\n{first},1\n")
    assert read_evaluation(path, "one", "test").sequences == 2
    assert "searched" not in capsys.readouterr().err


def test_a_finished_dataset_has_not_all_that_a_list_needs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "gue", [random_bases(5, 100)])
    warning = "warning: {}: holds for the sequences of {} only"

    def warned(dataset: Path) -> str:
        assert run(["audit", str(dataset), "--against", str(tmp_path / "gue"), "--exclusions", str(tmp_path / "x.tsv")]) == 0
        text = capsys.readouterr().err
        return text if warning.format(tmp_path / "x.tsv", dataset) in text else ""

    assert not warned(data / "dataset")
    genomes = tmp_path / "data/genomes"
    shutil.copytree(data / "genomes", genomes)
    shutil.copy(data / "tokenizer.json", tmp_path / "data")
    shutil.copy(genomes / "virus.fa", genomes / "virus2.fa")
    shard(tmp_path / "data", tmp_path / "begun", "--num-tasks", "1", "--task", "0")
    assert not warned(tmp_path / "begun")
    assert run(["finalize", str(tmp_path / "begun")]) == 0
    assert " duplicates; for other datasets of these genomes audit one before `finalize`" in warned(tmp_path / "begun")
    shard(data, tmp_path / "paper", "--packing", "paper")
    assert "without what `--packing paper` truncated; for" in warned(tmp_path / "paper")


def test_both_splits(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(data, tmp_path / "out", "--valid-fraction", "0.3")
    whole = Dataset(tmp_path / "out")
    for name in ("train", "valid"):
        text = Codec(whole.tokenizer_path).decode(whole.split(name).read_block(0, 0).sequence(3))
        write_set(tmp_path / "gue" / name, [text])
    for split, expected in (("train", [1, 0]), ("valid", [0, 1]), ("both", [1, 1])):
        found = audit(tmp_path / "out", tmp_path / "gue", "--split-of-data", split, capsys=capsys)
        assert [row["matched"] for row in found["sets"]] == expected
        wanted = ("train", "valid") if split == "both" else (split,)
        assert found["training_sequences"] == sum(whole.manifest["splits"][name]["sequences"] for name in wanted)


def test_an_unfinished_dataset_says_what_is_missing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(data, tmp_path / "out", "--num-tasks", "2", "--task", "0")
    write_set(tmp_path / "gue/one", [random_bases(8, 100)])
    found = audit(tmp_path / "out", tmp_path / "gue", "--out", str(tmp_path / "report.md"), capsys=capsys)
    assert found["units_missing"] > 0
    assert f"{found['units_missing']} units were not there" in (tmp_path / "report.md").read_text()


def test_what_cannot_be_audited(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str, told: str, against: Path = tmp_path / "gue") -> None:
        assert run(["audit", str(data / "dataset"), "--against", str(against), *options]) == 2
        assert told in capsys.readouterr().err

    refused(told="gue: not a folder")
    (tmp_path / "gue/set").mkdir(parents=True)
    refused(told="gue: no train.csv, dev.csv, test.csv in it")
    write_set(tmp_path / "gue/set", [b"ACGTACGTAC"], "dev")
    refused(told="its 1 evaluation sets have no test")
    refused("--match-bases", "15", told="--match-bases 15: must be from 16 to 64")
    refused("--match-bases", "65", told="--match-bases 65: must be from 16 to 64")
    refused("--processes", "0", told="--processes 0: must be at least 1")
    write_set(tmp_path / "gue/set", [b"PROTEIN"])
    refused(told="set/test.csv: no column has a sequence of DNA in its first 1 rows")
    (tmp_path / "gue/set/test.csv").write_text('sequence,label\nACGTACGTAC,0\n"ACGTACGTAC,0\n')
    refused(told="set/test.csv, line 3: not CSV")
    (tmp_path / "gue/set/test.csv").write_text("label,sequence\n0,ACGTACGTAC\n1\n")
    refused(told="set/test.csv, line 3: 1 fields")
    (tmp_path / "gue/set/test.csv").write_bytes(b"label,sequence\n0,ACGTACGTAC\xff\n")
    refused(told="set/test.csv: not a text file")
    # A damaged shard is found by whichever process reads it.
    write_set(tmp_path / "gue/set", [random_bases(9, 100)])
    copy = tmp_path / "copy"
    shutil.copytree(data / "dataset", copy)
    path = sorted((copy / "train").glob("*.tar"))[1]
    path.write_bytes(path.read_bytes()[:2000])
    for processes in ("1", "2"):
        assert run(["audit", str(copy), "--against", str(tmp_path / "gue"), "--processes", processes]) == 2
        assert f"{path}" in capsys.readouterr().err
