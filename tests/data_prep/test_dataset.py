"""The format: what the writer writes, plain tar readers and webdataset read, and damage is found and named."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.dataset import SHARD_ROW, Dataset, ShardWriter, Split, npy_bytes, safe_join
from data_prep.storage import DamagedBlock, file_sha256, open_storage


def write(directory: Path, sequences: int) -> tuple[np.void | None, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(5, 4096, size, dtype=np.uint16) for size in rng.integers(8, 127, sequences)]
    writer = ShardWriter(directory, 7, 3)
    for number, each in enumerate(tokens):
        writer.add(each, number % 5, 10 * number)
    return writer.close(), tokens


def opened(directory: Path, row: np.void | None) -> Split:
    """A split of the one shard in `directory`."""
    return Split(open_storage(directory.parent), directory.name, np.array([row], dtype=SHARD_ROW))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    row, tokens = write(tmp_path, 2500)
    assert row is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000007.index.npy", "000007.tar"]
    assert (row["shard"], row["species"], row["blocks"], row["sequences"]) == (7, 3, 3, 2500)
    assert row["tokens"] == sum(map(len, tokens))
    assert bytes(row["sha256"]).hex() == file_sha256(tmp_path / "000007.tar")
    assert bytes(row["index_sha256"]).hex() == file_sha256(tmp_path / "000007.index.npy")
    assert row["bytes"] == (tmp_path / "000007.tar").stat().st_size
    split = opened(tmp_path, row)
    assert split.blocks(0)["sequences"].tolist() == [1024, 1024, 452]
    blocks = [split.read_block(0, number) for number in range(3)]
    assert [block.lengths.tolist() for block in blocks] == [
        [len(each) for each in tokens[start : start + 1024]] for start in (0, 1024, 2048)
    ]
    for number, each in enumerate(tokens):
        block = blocks[number // 1024]
        assert np.array_equal(block.sequence(number % 1024), each)
        assert block.source[number % 1024].tolist() == [number % 5, 10 * number, 1]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 1100)[0], write(tmp_path / "b", 1100)[0]
    assert first is not None and second is not None
    assert first.tobytes() == second.tobytes()


def test_a_shard_without_sequences_leaves_no_file(tmp_path: Path) -> None:
    assert write(tmp_path, 0)[0] is None
    assert list(tmp_path.iterdir()) == []


def test_plain_tar_and_webdataset_read_the_shards(dataset: Path) -> None:
    import webdataset

    shards = sorted((dataset / "train").glob("*.tar"))
    members = {"tokens.npy": "<u2", "lengths.npy": "<u2", "source.npy": "<i8"}
    sequences = 0
    for path in shards:
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.isfile() and member.mtime == 0
                stream = tar.extractfile(member)
                assert stream is not None
                array = np.load(io.BytesIO(stream.read()), allow_pickle=False)
                assert array.dtype == members[member.name.split(".", 1)[1]]
    samples = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).decode()
    for sample in samples:
        assert len(sample["tokens.npy"]) == sample["lengths.npy"].sum()
        assert len(sample["source.npy"]) == len(sample["lengths.npy"])
        sequences += len(sample["lengths.npy"])
    assert sequences == Dataset(dataset).manifest["splits"]["train"]["sequences"]


def test_damage_of_a_shard_is_found_where_it_is(tmp_path: Path) -> None:
    split = opened(tmp_path, write(tmp_path, 1500)[0])
    path, offset = tmp_path / "000007.tar", int(split.blocks(0)["offset"][1])
    assert split.describe_block(0, 1) == f"{path}: block 1 at offset {offset}"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[offset + 1000] ^= 1
    for data, reason in ((bytes(flipped), "crc32 differs"), (whole[: offset + 7], "7 of [0-9]+ bytes")):
        path.write_bytes(data)
        split.read_block(0, 0)
        with pytest.raises(DamagedBlock, match=rf"000007\.tar: block 1 at offset {offset} is damaged \({reason}\)"):
            split.read_block(0, 1)
    path.unlink()
    with pytest.raises(DamagedBlock, match=r"000007\.tar: block 0 at offset 0 is damaged \(file not found\)"):
        split.read_block(0, 0)


def test_a_block_table_must_be_the_recorded_one(tmp_path: Path) -> None:
    row, _ = write(tmp_path, 1500)
    assert row is not None
    path = tmp_path / "000007.index.npy"
    table = np.load(path)
    table["sequences"] = [1000, 500]  # as many, but not 1,024 in all blocks but the last
    path.write_bytes(npy_bytes(table))
    with pytest.raises(DamagedBlock, match=r"000007\.index\.npy is damaged \(sha256 differs"):
        opened(tmp_path, row).read_block(0, 0)
    for sequences in ([1000, 500], [1024, 477]):
        table["sequences"] = sequences
        path.write_bytes(npy_bytes(table))
        row["index_sha256"] = np.frombuffer(hashlib.sha256(npy_bytes(table)).digest(), np.uint8)
        with pytest.raises(DamagedBlock, match=r"000007\.index\.npy is damaged \(it does not match its row 0"):
            opened(tmp_path, row).read_block(0, 0)
    path.unlink()
    with pytest.raises(DamagedBlock, match=r"000007\.index\.npy is damaged \(file not found\)"):
        opened(tmp_path, row).read_block(0, 0)
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"000007\.index\.npy"):
        opened(tmp_path, row).read_block(0, 0)
    assert opened(tmp_path, row).describe_shard(0) == str(tmp_path / "000007.tar")  # without the index


def test_opening_checks_the_small_files(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: not found"):
        Dataset(tmp_path)
    manifest = json.loads((dataset / "manifest.json").read_bytes())
    for name in manifest["files"]:
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((dataset / name).read_bytes())
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    Dataset(tmp_path)
    (tmp_path / "train" / "contigs.tsv").unlink()  # training does not need it
    assert Dataset(str(tmp_path)).path == tmp_path
    for name in ("tokenizer.json", "valid/shards.npy"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(InputError, match=f"{name}: sha256 differs"):
            Dataset(tmp_path)
        (tmp_path / name).write_bytes(whole)
    outside = json.dumps({**manifest, "files": {**manifest["files"], "tokenizer.json": "../../elsewhere"}}).encode()
    for contents, words in (
        (b"no json", "not a dataset manifest"),
        (b'{"format_version": 99}', "format_version 99"),
        (outside, r"has no tokenizer\.json"),
    ):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=words):
            Dataset(tmp_path)


def test_paths_cannot_leave_the_folder(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "train/shards.npy") == tmp_path / "train" / "shards.npy"
    for path in ("/etc/passwd", "../x", "train/../../x"):
        with pytest.raises(InputError):
            safe_join(tmp_path, path)
