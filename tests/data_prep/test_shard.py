"""The promises of the dataset: each sequence is what stands at its source, and bytes depend on the input only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_prep import plan as planning
from data_prep.__main__ import run
from data_prep.codec import Codec
from data_prep.dataset import SPLITS, Dataset, ShardWriter
from data_prep.inputs import fasta
from data_prep.inputs.fasta import read_fasta
from data_prep.inputs.genomes import find_genomes
from data_prep.kmers import reverse_complement
from data_prep.pack import MINIMUM_TOKENS
from tests.data_prep.conftest import SMALL, random_bases

Shard = Callable[..., int]


def tree(root: Path) -> dict[str, str]:
    """sha256 of every file below `root`."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def contigs(dataset: Path, genomes: Path) -> dict[int, tuple[str, str, bytes]]:
    """Species, file and cleaned bases of every contig, read from the genomes by what contigs.tsv says."""
    found: dict[int, tuple[str, str, bytes]] = {}
    records: dict[str, int] = {}
    lines = (dataset / "train/contigs.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["contig", "species", "file", "name", "length"]
    for line in lines[1:]:
        number, species, file, name, length = line.split("\t")
        record = records[file] = records.get(file, -1) + 1
        pieces = [piece for piece in read_fasta(genomes / file) if piece.record == record]
        bases = b"".join(piece.bases for piece in pieces)
        assert (pieces[0].name, len(bases), int(number)) == (name, int(length), len(found))
        found[int(number)] = (species, file, bases)
    return found


def test_every_sequence_is_what_stands_at_its_source(dataset: Path, genomes: Path) -> None:
    whole = Dataset(dataset)
    tokenizer = Tokenizer.from_file(str(whole.tokenizer_path))
    sources = contigs(dataset, genomes)
    covered: dict[int, set[int]] = {number: set() for number in sources}
    split_of_region: dict[tuple[int, int], str] = {}
    kept = dict.fromkeys((row["name"] for row in whole.manifest["species"]), 0)
    for name in SPLITS:
        split, sequences, tokens = whole.split(name), 0, 0
        for row in range(len(split.shards)):
            species = whole.manifest["species"][split.shards["species"][row]]
            for number in range(len(split.blocks(row))):
                block = split.read_block(row, number)
                for each, (contig, start, strand) in enumerate(block.source.tolist()):
                    ids = block.sequence(each)
                    assert MINIMUM_TOKENS <= len(ids) <= 18
                    text = "".join(str(tokenizer.id_to_token(token)) for token in ids.tolist()).encode()
                    assert sources[contig][:2] == (species["name"], species["file"])
                    assert text == sources[contig][2][start : start + len(text)]
                    assert strand == 1
                    places = set(range(start, start + len(text)))
                    assert not places & covered[contig]
                    covered[contig] |= places
                    region = (contig, start // 2000)
                    assert (start + len(text) - 1) // 2000 == region[1]
                    assert split_of_region.setdefault(region, name) == name
                    kept[species["name"]] += len(text)
                    sequences, tokens = sequences + 1, tokens + len(ids)
        stated = whole.manifest["splits"][name]
        assert (stated["sequences"], stated["tokens"], stated["shards"]) == (sequences, tokens, len(split.shards))
        assert stated["blocks"] == split.shards["blocks"].sum()
        assert sequences > 100
    assert kept == {row["name"]: row["bases"]["kept"] for row in whole.manifest["species"]}


def test_what_is_not_kept_is_counted(dataset: Path, genomes: Path) -> None:
    sources = contigs(dataset, genomes)
    for row in Dataset(dataset).manifest["species"]:
        bases = [text for species, _, text in sources.values() if species == row["name"]]
        assert row["bases"]["in"] == sum(map(len, bases))
        assert row["bases"]["dropped"]["not_acgt"] == sum(text.count(b"N") for text in bases)
        assert row["bases"]["in"] == row["bases"]["kept"] + sum(row["bases"]["dropped"].values())
        assert row["file_sha256"] == hashlib.sha256((genomes / row["file"]).read_bytes()).hexdigest()
        assert row["contigs"] == len(bases)


def test_bytes_do_not_depend_on_tasks_or_crashes(
    dataset: Path, shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "three"
    for task in (2, 0):
        assert shard(out, "--num-tasks", "3", "--task", str(task)) == 0
    assert run(["finalize", str(out)]) == 2  # task 1 has not run

    closes: list[int] = []

    def dies(self: ShardWriter) -> None:
        closes.append(self.shard)
        raise RuntimeError("the node is gone")

    with monkeypatch.context() as patch:  # in the middle of a unit
        patch.setattr(ShardWriter, "seal", dies)
        assert shard(out, "--num-tasks", "3", "--task", "1") == 1
    assert len(closes) == 1
    assert run(["finalize", str(out)]) == 2
    assert not (out / "manifest.json").exists()
    # What a killed task can leave: partial files, a shard without a marker, a marker whose shard is gone or cut.
    (out / "train" / ".000001.tar.x.partial").write_bytes(b"half")
    shards = sorted((out / "train").glob("*.tar"))
    marker = [out / ".work" / f"unit-{path.stem}.json" for path in shards]
    assert all(path.is_file() for path in marker)
    marker[0].unlink()
    shards[1].write_bytes(b"half")
    shards[2].unlink()
    marker[3].write_bytes(b"")
    assert run(["finalize", str(out)]) == 2
    for task in range(7):  # and now another number of tasks
        assert shard(out, "--num-tasks", "7", "--task", str(task)) == 0
    assert not (out / "manifest.json").exists()
    assert run(["finalize", str(out)]) == 0
    assert tree(out) == tree(dataset)
    assert run(["finalize", str(out)]) == 0
    assert tree(out) == tree(dataset)


def test_two_tasks_on_the_same_units_do_no_harm(dataset: Path, shard: Shard, tmp_path: Path) -> None:
    out = tmp_path / "twice"
    with ThreadPoolExecutor(2) as threads:
        tasks = [threads.submit(shard, out, "--num-tasks", "1", "--task", "0") for _ in range(2)]
        assert [task.result() for task in tasks] == [0, 0]
    assert run(["finalize", str(out)]) == 0
    assert tree(out) == tree(dataset)


def test_a_marker_saves_the_work(shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--duplicates", "none"]  # or finalize would write shards
    assert shard(tmp_path / "out", *options, "--num-tasks", "1", "--task", "0") == 0
    monkeypatch.setattr(ShardWriter, "__init__", None)  # any unit that is built again would fail
    assert shard(tmp_path / "out", *options) == 0


def test_a_finished_dataset_is_left_alone(
    dataset: Path, shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(dataset)
    assert shard(dataset, "--json") == 0
    captured = capsys.readouterr()
    assert "already whole" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["manifest_sha256"] == Dataset(dataset).sha256
    for options, key in (
        (["--seed", "5"], "seed 0, not 5"),
        (["--sequence-length", "30"], "--sequence-length 20, not 30"),
        (["--streams", "2"], "streams 1, not 2"),
    ):
        assert shard(dataset, *options) == 2
        assert key in capsys.readouterr().err
    assert tree(dataset) == before


def test_a_begun_dataset_keeps_its_parameters(
    genomes: Path, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, out = tmp_path / "genomes", tmp_path / "out"
    shutil.copytree(genomes, mine)
    command = ["shard", "--genomes", str(mine), "--tokenizer", str(tokenizer_file), "--out", str(out), "--unit-bases"]
    task = ["--num-tasks", "2", "--task"]
    assert run([*command, "7000", *task, "0"]) == 0
    assert run([*command, "8000", *task, "1"]) == 2
    assert "--unit-bases 7000, not 8000" in capsys.readouterr().err
    (mine / "new.fa").write_bytes(b">a\nACGT\n")
    assert run([*command, "7000", *task, "1"]) == 2
    assert "new.fa of --genomes is new" in capsys.readouterr().err
    (mine / "new.fa").unlink()
    # The last file, so of task 1: same size, another base. Only its checksum tells.
    path = mine / "virus/phage.fa"
    path.write_bytes(path.read_bytes().replace(b"ACGT", b"ACGG", 1))
    assert run([*command, "7000", *task, "1"]) == 2
    assert f"{path}: has changed" in capsys.readouterr().err
    assert run(["finalize", str(out)]) == 2
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.partial"))


def test_nothing_depends_on_the_machine(dataset: Path, genomes: Path) -> None:
    for path in dataset.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(genomes).encode() not in data and str(dataset).encode() not in data
    assert not list(dataset.rglob(".*"))


def test_a_folder_that_is_not_ours_is_left_alone(shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_bytes(b"years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        assert shard(out) == 2
        assert f"{out}: exists and is not a dataset" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_killed_from_outside_it_goes_on(
    dataset: Path, genomes: Path, tokenizer_file: Path, tmp_path: Path, number: int, status: int
) -> None:
    """The real signal, in another process, once the first marker is there."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "data_prep", "shard", "--genomes", str(genomes)]
    command += ["--tokenizer", str(tokenizer_file), "--out", str(out), *SMALL]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((out / ".work").glob("unit-*.json")):
        time.sleep(0.001)
    process.send_signal(number)
    process.wait()
    assert process.returncode in (status, 0)
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
    assert tree(out) == tree(dataset)


def test_the_first_plan_counts(
    shard: Shard, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that was slow to plan finds another's plan: it goes on with the same one and stops at another one."""
    scan_all = planning.scan_all

    def slow(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(planning, "scan_all", scan_all)
            assert shard(out, "--num-tasks", "2", "--task", "0") == 0
        return scan_all(*args)

    out = tmp_path / "other"
    monkeypatch.setattr(planning, "scan_all", slow)
    assert shard(out, "--num-tasks", "2", "--task", "1", "--seed", "9") == 2
    assert "was made with --seed 0, not 9" in capsys.readouterr().err
    out = tmp_path / "same"
    assert shard(out, "--num-tasks", "2", "--task", "1") == 0
    assert run(["finalize", str(out)]) == 0
    assert tree(out) == tree(dataset)


def test_a_task_that_wakes_up_late_changes_nothing(
    shard: Shard, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seal, out = ShardWriter.seal, tmp_path / "out"

    def late(self: ShardWriter) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "seal", seal)
            assert shard(out) == 0  # all of it, and finalized
        return seal(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "seal", late)
        assert shard(out, "--num-tasks", "1", "--task", "0") == 2
    assert "`finalize` began before unit 0 was built" in capsys.readouterr().err
    assert run(["finalize", str(out)]) == 0
    assert tree(out) == tree(dataset)


def test_no_unit_counts_before_its_text_was_compared(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file changes after the scan; or a task is killed before it comes to the point where that would be found."""
    path, out = tmp_path / "genomes/a.fa", tmp_path / "out"
    path.parent.mkdir()
    text = b">c\n" + b"".join(random_bases(seed, 3000) + b"N" * 997_000 for seed in range(4))
    path.write_bytes(text)
    monkeypatch.setattr(fasta, "POINT_BYTES", 1 << 20)
    command = ["shard", "--genomes", str(path.parent), "--tokenizer", str(tokenizer_file), "--out", str(out)]
    command += ["--unit-bases", "1000000", "--region-bases", "500000", "--valid-fraction", "0"]
    options = planning.Options(unit_bases=1_000_000, region_bases=500_000, valid_fraction=0)
    planning.open_plan(out, find_genomes(path.parent), Codec(tokenizer_file), options)

    def done() -> list[int]:
        return sorted(int(marker.stem[5:]) for marker in (out / ".work").glob("unit-??????.json"))

    path.write_bytes(b">c\n" + reverse_complement(text[3:3003]) + text[3003:])
    assert run(command) == 2
    assert "a.fa: has changed since it was scanned" in capsys.readouterr().err and done() == []
    path.write_bytes(text)
    seal = ShardWriter.seal

    def dies(self: ShardWriter) -> Any:
        if self.shard == 3:
            raise RuntimeError("the node is gone")
        return seal(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "seal", dies)
        assert run(command) == 1
    assert done() == [0, 1]  # the text of unit 2 was not yet compared
    assert run(command) == 0


def test_what_a_kill_leaves_in_the_folder_goes(shard: Shard, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shard(out, "--num-tasks", "1", "--task", "0") == 0
    (out / ".manifest.json.abcd").write_bytes(b"half")
    (out / ".work.abcd").mkdir()
    assert shard(out) == 0
    assert tree(out) == tree(dataset) and sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in dataset.iterdir()
    )


def test_one_finalize_at_a_time(shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path, "--num-tasks", "1", "--task", "0") == 0
    with (tmp_path / ".work/finalize.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(["finalize", str(tmp_path)]) == 2
        assert "another `finalize` of it is running" in capsys.readouterr().err
    assert run(["finalize", str(tmp_path)]) == 0
