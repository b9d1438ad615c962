"""The dataset directory: the one format that data preparation writes and pre-training reads.

    dataset/
      manifest.json          small; written last, so its presence means that the dataset is whole
      tokenizer.json         Hugging Face tokenizers file that made the tokens
      train/shards.npy       a row a shard (SHARD_ROW)          valid/shards.npy
      train/contigs.tsv      number, species, file, name, length of every contig of both splits
      train/000012.tar       a WebDataset shard: plain tar      train/000012.index.npy  a row a block (BLOCK_ROW)

A tar sample is a block of up to 1,024 sequences, because a tar header costs more than the 250 bytes of one sequence:

    <shard>-<block>.tokens.npy   uint16 [tokens]       content tokens of all sequences, one after the other
    <shard>-<block>.lengths.npy  uint16 [sequences]    how many tokens each sequence has
    <shard>-<block>.source.npy   int64  [sequences, 3] contig number, start (0-based, forward strand), strand (+1, -1)

[CLS] and [SEP] are not stored; the loader adds them. A shard holds one unit of work of one species and carries the
unit's number; a unit whose bases all fall into the other split has no shard here, so the numbers may have gaps. All
arrays are numeric, little-endian and read with allow_pickle=False. Equal input gives equal bytes: tar members have
mtime 0.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, write_atomically

FORMAT_VERSION = 1
SPLITS = ("train", "valid")
SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")  # ids 0 to 4 of every tokenizer; content tokens follow
REQUIRED = ("tokenizer", "sequence_length", "order", "splits", "species", "files")  # keys of the manifest
SEQUENCES_PER_BLOCK = 1024
SHARD_ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("species", "<u2"),  # row of the manifest's species table
        ("blocks", "<u4"),
        ("sequences", "<u8"),
        ("tokens", "<u8"),
        ("bytes", "<u8"),
        ("sha256", "u1", (32,)),  # of the tar
        ("index_sha256", "u1", (32,)),
    ]
)
BLOCK_ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("sequences", "<u4"), ("tokens", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True)
class Block:
    """Up to 1,024 sequences; `bounds` has one entry more than there are sequences."""

    tokens: NDArray[np.uint16]  # [tokens]
    bounds: NDArray[np.int64]  # [sequences + 1] where each sequence starts and ends in `tokens`
    source: NDArray[np.int64]  # [sequences, 3]

    def sequence(self, number: int) -> NDArray[np.uint16]:
        """Content tokens of one sequence, without [CLS] and [SEP]."""
        return self.tokens[self.bounds[number] : self.bounds[number + 1]]


class ShardWriter:
    """Writes one shard under a temporary name; `close()` makes it durable, renames it and returns its table row."""

    def __init__(self, directory: Path, shard: int, species: int) -> None:
        self.directory, self.shard, self.species = directory, shard, species
        self.path = directory / f"{shard:06d}.tar"
        self._sequences: list[NDArray[np.uint16]] = []
        self._source: list[tuple[int, int, int]] = []
        self._rows: list[tuple[int, int, int, int, int]] = []
        directory.mkdir(parents=True, exist_ok=True)
        # Names of its own: two tasks that build one shard at once write the same bytes, and the last to rename wins.
        handle, name = tempfile.mkstemp(dir=directory, prefix=f".{shard:06d}.tar.", suffix=".partial")
        os.fchmod(handle, 0o644)
        self._partial, self._file = Path(name), os.fdopen(handle, "w+b")
        from webdataset import (
            TarWriter,
        )  # here, because it imports torch where torch is installed: two seconds a command

        self._tar = TarWriter(self._file, encoder=False, compress=False, mtime=0)

    def add(self, tokens: NDArray[np.uint16], contig: int, start: int, strand: int = 1) -> None:
        """Append one sequence of content tokens that starts at base `start` of contig number `contig`."""
        self._sequences.append(tokens)
        self._source.append((contig, start, strand))
        if len(self._sequences) == SEQUENCES_PER_BLOCK:
            self._write_block()

    def _write_block(self) -> None:
        lengths = np.array([len(tokens) for tokens in self._sequences], dtype="<u2")
        arrays = {
            "tokens.npy": np.concatenate(self._sequences).astype("<u2"),
            "lengths.npy": lengths,
            "source.npy": np.array(self._source, dtype="<i8").reshape(-1, 3),
        }
        offset = self._tar.tarstream.offset
        sample: dict[str, Any] = {name: npy_bytes(array) for name, array in arrays.items()}
        self._tar.write({"__key__": f"{self.shard:06d}-{len(self._rows):06d}", **sample})
        size = self._tar.tarstream.offset - offset
        self._rows.append((offset, size, len(lengths), int(lengths.sum(dtype=np.int64)), 0))
        self._sequences, self._source = [], []

    def close(self) -> np.void | None:
        """Commit the shard: its row of shards.npy, or None (and no file) when it holds no sequence."""
        if self._sequences:
            self._write_block()
        self._tar.close()
        if not self._rows:
            self.abort()
            return None
        digest, index = hashlib.sha256(), np.array(self._rows, dtype=BLOCK_ROW)
        self._file.seek(0)
        for block in index:  # read back: the sums then cover what the file system will give to readers
            data = self._file.read(int(block["size"]))
            block["crc32"] = zlib.crc32(data)
            digest.update(data)
        digest.update(self._file.read())  # the tar's end marker
        total = self._file.tell()
        os.fsync(self._file.fileno())
        self._file.close()
        index_bytes = npy_bytes(index)
        write_atomically(self.directory / f"{self.shard:06d}.index.npy", index_bytes)
        os.replace(self._partial, self.path)
        table = np.zeros(1, dtype=SHARD_ROW)
        row: np.void = table[0]
        row["shard"], row["species"], row["bytes"], row["blocks"] = self.shard, self.species, total, len(index)
        row["sequences"], row["tokens"] = index["sequences"].sum(), index["tokens"].sum(dtype=np.uint64)
        row["sha256"] = np.frombuffer(digest.digest(), np.uint8)
        row["index_sha256"] = np.frombuffer(hashlib.sha256(index_bytes).digest(), np.uint8)
        return row

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class Split:
    """One split of a finished dataset, read by index: shard row -> block -> sequence."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shards: NDArray[np.void] = np.load(directory / "shards.npy", mmap_mode="r", allow_pickle=False)
        if self.shards.dtype != SHARD_ROW:
            raise InputError(f"{directory / 'shards.npy'}: not a shard table of format {FORMAT_VERSION}; shard again")
        # Tables of 40 bytes a block; 4,096 of them are the working set of the largest number of streams.
        self.blocks = lru_cache(maxsize=4096)(self._blocks)

    def _blocks(self, row: int) -> NDArray[np.void]:
        """The shard's block table (BLOCK_ROW)."""
        path = self.directory / f"{int(self.shards['shard'][row]):06d}.index.npy"
        table: NDArray[np.void] = np.load(path, allow_pickle=False)
        if table.dtype != BLOCK_ROW or len(table) != self.shards["blocks"][row]:
            raise InputError(f"{path}: does not match its row {row} of shards.npy; shard this unit again")
        return table

    def read_block(self, row: int, block: int) -> Block:
        """Read and check one block by its byte range.

        Raises InputError naming shard, block and offset when the bytes are not those that were written.
        """
        entry = self.blocks(row)[block]
        path = self.directory / f"{int(self.shards['shard'][row]):06d}.tar"
        with path.open("rb") as stream:
            stream.seek(int(entry["offset"]))
            data = stream.read(int(entry["size"]))
        if len(data) != entry["size"] or zlib.crc32(data) != entry["crc32"]:
            raise InputError(f"{path}: block {block} at offset {entry['offset']} is damaged (crc32 differs); shard again")
        arrays = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                contents = tar.extractfile(member)
                assert contents is not None  # the crc covers the headers: every member is a regular file
                name = member.name.split(".", 1)[1]
                arrays[name] = np.load(io.BytesIO(contents.read()), allow_pickle=False)
        bounds = np.concatenate([[0], np.cumsum(arrays["lengths.npy"], dtype=np.int64)])
        return Block(arrays["tokens.npy"], bounds, arrays["source.npy"])


class Dataset:
    """A finished dataset directory. Opening it checks the manifest and the sums of the files that it lists."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest_path = self.path / "manifest.json"
        if not manifest_path.is_file():
            raise InputError(f"{manifest_path}: not found; `python -m data_prep shard` (and `finalize`) writes it last")
        data = manifest_path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.manifest: dict[str, Any] = json.loads(data)
            version = self.manifest["format_version"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{manifest_path}: not a dataset manifest; shard again") from None
        if version != FORMAT_VERSION:
            raise InputError(f"{manifest_path}: format_version {version}, this code reads {FORMAT_VERSION}; shard again")
        missing = [key for key in REQUIRED if key not in self.manifest]
        if missing:
            raise InputError(f"{manifest_path}: has no {', '.join(missing)}; it is not whole, shard again")
        for name, digest in self.manifest["files"].items():
            if file_sha256(safe_join(self.path, name)) != digest:
                raise InputError(f"{self.path / name}: sha256 differs from manifest.json; shard again")

    def split(self, name: str) -> Split:
        """`train` or `valid`."""
        if name not in SPLITS:
            raise InputError(f"{self.path}: no split {name!r}, there are {', '.join(SPLITS)}")
        return Split(self.path / name)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, refusing absolute paths and `..` so that a manifest can't point outside its folder."""
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise InputError(f"{relative!r}: paths in manifests are relative and without '..'")
    return root / relative


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
