"""Writes and reads BGZF, the gzip of genomics, so that reading can begin in the middle of a genome.

A BGZF file is a series of gzip members of less than 64 KiB, each with its compressed size in an extra field, and an
empty one as end marker (SAM specification, section 4.1). Any gzip reader reads it; with the index (`.gzi`, as
`bgzip --index` writes it) it can be read from any place on.

    index  uint64 number of entries, then [entries, 2] uint64: compressed and uncompressed offset at which a block starts,
           without the first block, whose two are 0; all little-endian

Blocks hold as many bytes as those of `bgzip` and have no time or name in them: equal text gives equal files, as long as
zlib is the same.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError
from data_prep.inputs.fasta import Digest

BLOCK_BYTES = 0xFF00  # of text in a block: even where zlib can't make them fewer, a block stays below 64 KiB
LEVEL = 4  # on DNA 55 MB/s, and 4 % more bytes than level 6, bgzip's own, which makes 8 MB/s
HEADER = struct.Struct("<4sI2BH2sHH")  # magic and flags, time, hints, system, extra bytes, b"BC", its size, block bytes - 1
MAGIC = b"\x1f\x8b\x08\x04"  # gzip, deflated, with an extra field
TRAILER = struct.Struct("<II")  # crc32 and size of the text
MAXIMUM_TEXT = 1 << 16  # bytes in a block, whoever wrote it


def compress(chunks: Iterable[bytes], stream: BinaryIO, *, digest: Digest | None = None, level: int = LEVEL) -> bytes:
    """Write the chunks to `stream` as BGZF and return the index; `digest` is fed the bytes written.

    Memory is a chunk, a block and 16 bytes of index a block (0.8 MB for 3 Gb).
    """
    starts: list[tuple[int, int]] = []
    compressed = size = 0
    for text in _blocks(chunks):
        starts.append((compressed, size))
        block = _block(text, level)
        stream.write(block)
        if digest is not None:
            digest.update(block)
        compressed, size = compressed + len(block), size + len(text)
    end = _block(b"", 6)
    stream.write(end)
    if digest is not None:
        digest.update(end)
    table = np.array(starts[1:], dtype="<u8").reshape(-1, 2)
    return struct.pack("<Q", len(table)) + table.tobytes()


def index_path(path: Path) -> Path:
    """Where the index of a BGZF file lies."""
    return path.with_name(path.name + ".gzi")


def read_index(path: Path) -> NDArray[np.uint64]:
    """The index of the BGZF file `path`, [blocks, 2] with the first block: compressed and uncompressed offset of each.

    Raises InputError naming the index when it is missing, damaged, or not that of the file.
    """
    index = index_path(path)
    if not index.is_file():
        raise InputError(f"{index}: not found; make it with `bgzip --reindex {path}` or fetch the genome again")
    data = index.read_bytes()
    table = np.frombuffer(data[8 : len(data) - len(data) % 8], "<u8")
    table = np.concatenate([np.zeros(2, np.uint64), table[: len(table) // 2 * 2]]).reshape(-1, 2)
    whole = len(data) == 8 + 16 * (len(table) - 1) and int.from_bytes(data[:8], "little") == len(table) - 1
    if not whole or (table[1:] <= table[:-1]).any() or table[-1, 0] >= path.stat().st_size:
        raise InputError(f"{index}: damaged or of another file; make it with `bgzip --reindex {path}`")
    return table


def open_at(path: Path, offset: int) -> Iterator[bytes]:
    """Yield the text of a BGZF file from byte `offset` of it on, a block (up to 64 KiB) at a time, checked.

    Yields nothing at or behind the text's end. Raises InputError naming file and place when the file or its index is
    damaged.
    """
    index = read_index(path)
    block = int(np.searchsorted(index[:, 1], np.uint64(offset), side="right")) - 1
    place, start = (int(number) for number in index[block])
    skip = offset - start
    for text in _texts(path, place):
        if skip < len(text):
            yield text[skip:]
        skip = max(skip - len(text), 0)


def _texts(path: Path, place: int) -> Iterator[bytes]:
    """The texts of all blocks from the one at byte `place` of the file on."""
    with path.open("rb") as stream:
        stream.seek(place)
        marked = False  # the last block was an end marker
        while header := stream.read(HEADER.size):
            text = _read_block(header, stream)
            if text is None:
                raise InputError(f"{path}: no whole BGZF block at byte {place}; get the file again")
            place, marked = stream.tell(), not text
            if text:
                yield text
        if not marked or place != os.fstat(stream.fileno()).st_size:
            raise InputError(f"{path}: ends at byte {place} without BGZF's end marker; get the file again")


def _read_block(header: bytes, stream: BinaryIO) -> bytes | None:
    """The text of the block whose header was read, or None if it is not a BGZF block or not whole."""
    if len(header) < HEADER.size:
        return None
    magic, _, _, _, extra, name, size, last = HEADER.unpack(header)
    if (magic, extra, name, size) != (MAGIC, 6, b"BC", 2) or last + 1 < HEADER.size + TRAILER.size:
        return None
    body = stream.read(last + 1 - HEADER.size)
    try:
        unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        text = unpacker.decompress(body[: -TRAILER.size], MAXIMUM_TEXT)
    except zlib.error:
        return None
    whole = len(body) == last + 1 - HEADER.size and TRAILER.unpack(body[-TRAILER.size :]) == (zlib.crc32(text), len(text))
    return text if whole else None


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes cut into blocks of BLOCK_BYTES and a last one of what is left, if anything is."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        whole = len(rest) // BLOCK_BYTES * BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            yield rest[start : start + BLOCK_BYTES]
        rest = rest[whole:]
    if rest:
        yield rest


def _block(text: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, wbits=-zlib.MAX_WBITS)
    body = packer.compress(text) + packer.flush()
    header = HEADER.pack(MAGIC, 0, 0, 0xFF, 6, b"BC", 2, HEADER.size + len(body) + TRAILER.size - 1)
    return header + body + TRAILER.pack(zlib.crc32(text), len(text))
