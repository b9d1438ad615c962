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

All blocks of a shard but the last hold exactly 1,024 sequences; readers rely on it to find a sequence. [CLS] and [SEP]
are not stored; the loader adds them. A shard holds one unit of work of one species and carries the unit's number; a unit
whose bases all fall into the other split has no shard here, so the numbers may have gaps. All arrays are numeric and
little-endian; tables are read with allow_pickle=False. Equal input gives equal bytes: tar members have mtime 0.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, fsync_directory, write_atomically
from data_prep.storage import Cache, DamagedBlock, LocalStorage, Storage, open_storage

FORMAT_VERSION = 1
SPLITS = ("train", "valid")
SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")  # ids 0 to 4 of every tokenizer; content tokens follow
REQUIRED = ("tokenizer", "sequence_length", "order", "splits", "species", "files")  # keys of the manifest
NEEDED = ("tokenizer.json", *(f"{split}/shards.npy" for split in SPLITS))  # files of the manifest that training needs
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
    """Up to 1,024 sequences, as they are stored. The arrays can't be written to: they are views of the bytes read."""

    tokens: NDArray[np.uint16]  # [tokens]
    lengths: NDArray[np.uint16]  # [sequences]
    source: NDArray[np.int64]  # [sequences, 3]

    def sequence(self, number: int) -> NDArray[np.uint16]:
        """Content tokens of one sequence, without [CLS] and [SEP]."""
        start = int(self.lengths[:number].sum(dtype=np.int64))
        return self.tokens[start : start + int(self.lengths[number])]


class ShardWriter:
    """Writes one shard under a temporary name; `close()` makes it durable, renames it and returns its table row."""

    def __init__(self, directory: Path, shard: int, species: int) -> None:
        self.directory, self.shard, self.species = directory, shard, species
        self.path = directory / f"{shard:06d}.tar"
        self._parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []  # tokens, lengths, source of the open block
        self._waiting = 0  # sequences in them
        self._rows: list[tuple[int, int, int, int, int]] = []
        directory.mkdir(parents=True, exist_ok=True)
        # Names of its own: two tasks that build one shard at once write the same bytes, and the last to rename wins.
        handle, name = tempfile.mkstemp(dir=directory, prefix=f".{shard:06d}.tar.", suffix=".partial")
        os.fchmod(handle, 0o644)
        self._partial, self._file = Path(name), os.fdopen(handle, "w+b")
        # Here, because it imports torch where torch is installed: two seconds a command.
        from webdataset import TarWriter

        self._tar = TarWriter(self._file, encoder=False, compress=False, mtime=0)

    def add(self, tokens: NDArray[np.uint16], contig: int, start: int, strand: int = 1) -> None:
        """Append one sequence of content tokens that starts at base `start` of contig number `contig`."""
        self.extend(tokens, np.array([len(tokens)]), np.array([[contig, start, strand]]))

    def extend(self, tokens: NDArray[np.uint16], lengths: NDArray[Any], source: NDArray[np.int64]) -> None:
        """Append sequences: all their content tokens [tokens], how many each has [sequences], source [sequences, 3]."""
        while len(lengths):
            room = SEQUENCES_PER_BLOCK - self._waiting
            size = int(lengths[:room].sum())
            self._parts.append((tokens[:size], lengths[:room], source[:room]))
            self._waiting += len(lengths[:room])
            tokens, lengths, source = tokens[size:], lengths[room:], source[room:]
            if self._waiting == SEQUENCES_PER_BLOCK:
                self._write_block()

    def _write_block(self) -> None:
        tokens, lengths, source = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        arrays = {
            "tokens.npy": tokens.astype("<u2"),
            "lengths.npy": lengths.astype("<u2"),
            "source.npy": source.astype("<i8"),
        }
        offset = self._tar.tarstream.offset
        sample: dict[str, Any] = {name: npy_bytes(array) for name, array in arrays.items()}
        self._tar.write({"__key__": f"{self.shard:06d}-{len(self._rows):06d}", **sample})
        size = self._tar.tarstream.offset - offset
        self._rows.append((offset, size, len(lengths), int(lengths.sum(dtype=np.int64)), 0))
        self._parts, self._waiting = [], 0

    def close(self) -> np.void | None:
        """Commit the shard: its row of shards.npy, or None (and no file) when it holds no sequence."""
        row = self.seal()
        self.publish()
        return row

    def seal(self) -> np.void | None:
        """Make the shard durable under its temporary name; what `close` returns."""
        if self._parts:
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
        self._index = index_bytes = npy_bytes(index)
        table = np.zeros(1, dtype=SHARD_ROW)
        row: np.void = table[0]
        row["shard"], row["species"], row["bytes"], row["blocks"] = self.shard, self.species, total, len(index)
        row["sequences"], row["tokens"] = index["sequences"].sum(), index["tokens"].sum(dtype=np.uint64)
        row["sha256"] = np.frombuffer(digest.digest(), np.uint8)
        row["index_sha256"] = np.frombuffer(hashlib.sha256(index_bytes).digest(), np.uint8)
        return row

    def publish(self) -> None:
        """Give a sealed shard its name, and its index."""
        if self._rows:
            write_atomically(self.directory / f"{self.shard:06d}.index.npy", self._index, sync_directory=False)
            os.replace(self._partial, self.path)
            fsync_directory(self.directory)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._tar.tarstream.closed = True  # or it would write to the closed file when it is collected
        self._partial.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk has no room for what is still buffered
            self._file.close()


class Split:
    """One split of a dataset, read by index: shard row -> block -> sequence. For any number of threads."""

    def __init__(self, storage: Storage, name: str, shards: NDArray[np.void]) -> None:
        """`shards` [shards] of SHARD_ROW is the split's table."""
        self.storage, self.name, self.shards = storage, name, shards
        # Tables of 28 bytes a block: one for each stream that a rank has open.
        self.blocks = lru_cache(maxsize=16384)(self._blocks)

    def _file(self, row: int, ending: str) -> str:
        return f"{self.name}/{int(self.shards['shard'][row]):06d}.{ending}"

    def _blocks(self, row: int) -> NDArray[np.void]:
        """The shard's block table (BLOCK_ROW). Raises DamagedBlock naming the index file, or OSError."""
        shard, name = self.shards[row], self._file(row, "index.npy")
        table = npy_array(self.storage.small(name, shard["index_sha256"].tobytes().hex()), BLOCK_ROW)
        if not (
            len(table) == shard["blocks"]
            and (table["sequences"][:-1] == SEQUENCES_PER_BLOCK).all()
            and table["sequences"].sum() == shard["sequences"]
        ):
            raise DamagedBlock(self.storage.describe(name), f"it does not match its row {row} of shards.npy")
        return table

    def describe_shard(self, row: int) -> str:
        """The shard's path or URL, for messages. Reads nothing, so that it can be asked while reading hangs."""
        return self.storage.describe(self._file(row, "tar"))

    def describe_block(self, row: int, block: int) -> str:
        """Where a block lies that was read, for messages. Reads the index if that is not in memory."""
        return f"{self.describe_shard(row)}: block {block} at offset {self.blocks(row)['offset'][block]}"

    def read_block(self, row: int, block: int) -> Block:
        """Read and check one block by its byte range.

        Raises DamagedBlock naming shard, block and offset when the bytes are not those that were written, or naming the
        shard's index when that is missing or not the recorded one; OSError when reading failed for a reason that may pass.
        """
        entry, key = self.blocks(row)[block], self.shards["sha256"][row].tobytes().hex()
        offset, size, crc32 = (int(entry[field]) for field in ("offset", "size", "crc32"))
        try:
            data = self.storage.read(self._file(row, "tar"), offset, size, crc32, key)
        except DamagedBlock as error:
            place = f"{self.describe_shard(row)}: block {block} at offset {offset}"
            raise DamagedBlock(place, error.reason) from None
        return parse_block(data)


def parse_block(data: bytes) -> Block:
    """The block of a tar sample, whose crc was checked before.

    Walks the 512-byte tar headers by itself: for 290 kB this takes 0.01 ms, tarfile and np.load together 0.2 ms, which is
    more than reading (0.03) and crc32 (0.1).
    """
    arrays: dict[bytes, NDArray[Any]] = {}
    start = 0
    while start < len(data):
        name = data[start : start + 100].rstrip(b"\0").split(b".")[1]
        size, start = int(data[start + 124 : start + 135], 8), start + 512
        arrays[name] = npy_array(data, np.dtype("<i8" if name == b"source" else "<u2"), start, size)
        start += -(-size // 512) * 512
    return Block(arrays[b"tokens"], arrays[b"lengths"], arrays[b"source"].reshape(-1, 3))


class Dataset:
    """A finished dataset, in a directory or at a URL (`data_prep.storage` says which; `cache` is for URLs).

    Opening checks the manifest and, in a directory, the sums of the small files that training needs. All other files are
    checked when they are first used.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None) -> None:
        self.storage = open_storage(path, cache)
        self._splits: dict[str, Split] = {}
        self.path = self.storage.location
        where = self.storage.describe("manifest.json")
        try:
            data = self.storage.read_whole("manifest.json")
        except FileNotFoundError:
            raise InputError(f"{where}: not found; `python -m data_prep shard` (and `finalize`) writes it last") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.manifest: dict[str, Any] = json.loads(data)
            version = self.manifest["format_version"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{where}: not a dataset manifest; shard again") from None
        if version != FORMAT_VERSION:
            raise InputError(f"{where}: format_version {version}, this code reads {FORMAT_VERSION}; shard again")
        missing = [key for key in REQUIRED if key not in self.manifest]
        sums = self.manifest.get("files", {})
        # A sum is a file's name in the cache: what is no sum must not get that far.
        missing += [name for name in NEEDED if not re.fullmatch("[0-9a-f]{64}", str(sums.get(name)))]
        if missing:
            raise InputError(f"{where}: has no {', '.join(missing)}; it is not whole, shard again")
        if isinstance(self.storage, LocalStorage):
            for name in NEEDED:
                self._file(name)

    def _file(self, name: str) -> Path:
        return self.storage.file(name, self.manifest["files"][name])

    def split(self, name: str) -> Split:
        """`train` or `valid`; its table is read and checked at the first call."""
        if name not in SPLITS:
            raise InputError(f"{self.path}: no split {name!r}, there are {', '.join(SPLITS)}")
        if name not in self._splits:
            file = f"{name}/shards.npy"
            shards = np.load(self._file(file), mmap_mode="r", allow_pickle=False)
            if shards.dtype != SHARD_ROW:
                raise InputError(f"{self.storage.describe(file)}: not a shard table of format {FORMAT_VERSION}; shard again")
            self._splits[name] = Split(self.storage, name, shards)
        return self._splits[name]

    @property
    def tokenizer_path(self) -> Path:
        """A local path of tokenizer.json."""
        return self._file("tokenizer.json")

    @property
    def contigs_path(self) -> Path:
        """A local path of contigs.tsv."""
        return self._file("train/contigs.tsv")


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, refusing absolute paths and `..` so that a manifest can't point outside its folder."""
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise InputError(f"{relative!r}: paths in manifests are relative and without '..'")
    return root / relative


def npy_array(data: bytes, dtype: np.dtype[Any], start: int = 0, size: int | None = None) -> NDArray[Any]:
    """The flat array, of a type known beforehand, of the .npy file that is `size` bytes (all) of `data` from `start` on.

    np.load would parse the header with `ast`, which must not run in two threads at once (CPython 3.11: "AST constructor
    recursion depth mismatch"), and readers are threads.
    """
    header = 10 + int.from_bytes(data[start + 8 : start + 10], "little")
    size = len(data) if size is None else size
    return np.frombuffer(data, dtype, (size - header) // dtype.itemsize, start + header)


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
