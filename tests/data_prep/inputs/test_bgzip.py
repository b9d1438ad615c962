"""BGZF: any gzip reader reads it, and ours from any place on; damage is named."""

from __future__ import annotations

import gzip
import io
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.inputs.bgzip import BLOCK_BYTES, compress, index_path, open_at, read_index

END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")  # the end marker of the specification
DNA = np.frombuffer(b"ACGT\n", np.uint8)[np.random.default_rng(0).integers(0, 5, 3 * BLOCK_BYTES + 100)].tobytes()


def write(path: Path, text: bytes, size: int = 1000) -> Path:
    with path.open("wb") as file:
        index_path(path).write_bytes(compress((text[at : at + size] for at in range(0, len(text), size)), file))
    return path


def blocks(data: bytes) -> list[tuple[int, int]]:
    """Offset and size of each block, by the extra field as the specification has it."""
    found, place = [], 0
    while place < len(data):
        assert data[place : place + 16] == bytes.fromhex("1f8b08040000000000ff060042430200")
        found.append((place, struct.unpack_from("<H", data, place + 16)[0] + 1))
        place += found[-1][1]
    assert place == len(data)
    return found


@pytest.mark.parametrize("text", [b"", b"A", DNA[:BLOCK_BYTES], DNA, np.random.default_rng(1).bytes(200_000)])
def test_is_gzip_in_blocks_with_the_index_of_bgzip(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "x.gz", text)
    data = path.read_bytes()
    assert gzip.decompress(data) == text
    parts = blocks(data)
    assert max(size for _, size in parts) <= 1 << 16
    assert data.endswith(END)
    assert parts[-1][1] == len(END)
    raw = index_path(path).read_bytes()
    (number,) = struct.unpack_from("<Q", raw)
    starts = [offset for offset, _ in parts[:-1]]
    assert list(struct.iter_unpack("<QQ", raw[8:])) == [(at, BLOCK_BYTES * n) for n, at in enumerate(starts)][1:]
    assert number == max(len(starts) - 1, 0)


def test_bytes_depend_on_the_text_only() -> None:
    files = []
    for size in (333, 7777, BLOCK_BYTES, len(DNA)):
        stream = io.BytesIO()
        index = compress((DNA[at : at + size] for at in range(0, len(DNA), size)), stream)
        files.append((stream.getvalue(), index))
    assert all(one == other for one, other in pairwise(files))


@pytest.mark.parametrize("offset", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, len(DNA) - 1, len(DNA), 10**12])
def test_reads_from_any_place_on(tmp_path: Path, offset: int) -> None:
    assert b"".join(open_at(write(tmp_path / "x.gz", DNA), offset)) == DNA[offset:]


def test_starts_at_the_block_that_holds_the_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gz", DNA)
    index, data = read_index(path), bytearray(path.read_bytes())
    data[100] ^= 1  # in the first block, which is not read
    path.write_bytes(data)
    assert index.shape == (4, 2)
    assert b"".join(open_at(path, BLOCK_BYTES)) == DNA[BLOCK_BYTES:]
    with pytest.raises(InputError, match=r"x\.gz: no whole BGZF block at byte 0"):
        list(open_at(path, 0))


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gz", DNA)
    data, index = path.read_bytes(), index_path(path).read_bytes()
    second = int(read_index(path)[1, 0])
    for damaged, message in (
        (data[:-1], r"x\.gz: no whole BGZF block at byte"),
        (data[: -len(END)], r"x\.gz: ends at byte \d+ without BGZF's end marker"),
        (data[: second + 10], rf"x\.gz: no whole BGZF block at byte {second}"),
        (data[: second + 30], rf"x\.gz: no whole BGZF block at byte {second}"),
        (gzip.compress(DNA, mtime=0), r"x\.gz: no whole BGZF block at byte 0"),
    ):
        path.write_bytes(damaged)
        index_path(path).write_bytes(struct.pack("<Q", 0))  # that of a single block: the real one may not fit what is left
        with pytest.raises(InputError, match=message):
            list(open_at(path, 0))
    path.write_bytes(data)
    for damaged in (b"", index[:-1], index[:-16], index[:8] + index[-16:] + index[24:-16] + index[8:24]):
        index_path(path).write_bytes(damaged)
        with pytest.raises(InputError, match=r"x\.gz\.gzi: damaged or of another file"):
            list(open_at(path, 0))
    index_path(path).unlink()
    with pytest.raises(InputError, match=r"x\.gz\.gzi: not found"):
        list(open_at(path, 0))
