"""Reads FASTA files of any size in constant memory: pieces of cleaned bases, a chunk at a time.

Libraries for short reads hold a whole record, which is 250 MB for a human chromosome. Here a file, plain or gzip
(told by its first bytes; several members, as bgzip writes them, are fine), passes through in chunks of 1 MiB, and a
chunk is cleaned by `bytes.translate` and `bytes.find` at C speed, whether its records are wrapped or stand on one
line.

Cleaned bases are upper case; every other character becomes N (IUPAC codes, masks, gaps, U), for the caller to cut at,
and white space goes. Letters that only proteins have are an error, because a protein file would otherwise be a
dataset of Ns.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from data_prep.cli import InputError

CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 1000  # of a header line are kept: a broken file may be one "header" of gigabytes
PROTEIN_LETTERS = b"EFILPQZJO*"
WHITESPACE = b" \t\r\n\v\f"
_PROTEIN = ord("!")
_CLEAN = bytearray(b"N" * 256)
for _letter in b"ACGT":
    _CLEAN[_letter] = _CLEAN[_letter + 32] = _letter
for _letter in PROTEIN_LETTERS + PROTEIN_LETTERS.lower():
    _CLEAN[_letter] = _PROTEIN


class Piece(NamedTuple):
    """Consecutive bases of one record. Every record yields an empty piece first, so that empty records are seen too."""

    record: int  # number of the record in its file, from 0
    name: str  # first word of its header
    start: int  # 0-based position of the first base in the record
    bases: bytes  # only A, C, G, T and N


class Digest(Protocol):
    """What is used of a `hashlib` object."""

    def update(self, data: bytes, /) -> None: ...


class DamagedGzip(Exception):
    """The compressed stream ends early or is not what was compressed."""


def read_fasta(path: Path, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """Yield the file's bases in order; how they are cut into pieces depends on chunks and means nothing.

    `digest` is fed the raw bytes as they are read, so that one pass gives bases and checksum.
    Raises InputError naming file and record.
    """
    record, name, start, total = -1, "", 0, 0
    header: bytearray | None = None  # the header line being read, which may span chunks
    line_start = True
    chunks = read_chunks(path, digest=digest, chunk_bytes=chunk_bytes)
    while True:
        try:
            chunk = next(chunks, None)
        except DamagedGzip as damage:
            place = f"in record {name!r} at base {start}" if record >= 0 else "before the first record"
            raise InputError(f"{path}: {damage}, {place}; get the file again") from None
        if chunk is None:
            break
        position = 0
        while position < len(chunk):
            if header is not None:
                end = _line_end(chunk, position)
                header += chunk[position : min(end, position + HEADER_BYTES - len(header))]
                position = end + 1
                if end < len(chunk):
                    name, header, line_start = _first_word(header), None, True
                    yield Piece(record, name, 0, b"")
                continue
            mark = chunk.find(b">", position)
            stop = len(chunk) if mark < 0 else mark
            if stop > position:
                text = chunk[position:stop]
                if record < 0 and text.strip(WHITESPACE):
                    raise InputError(f"{path}: starts without a '>' header line; is it a FASTA file?")
                bases = text.translate(_CLEAN, WHITESPACE)
                if _PROTEIN in bases:
                    found = re.search(rb"[EFILPQZJO*]", text, re.IGNORECASE)
                    letter = found[0].decode() if found else "?"
                    raise InputError(
                        f"{path}: record {name!r} has {letter!r} at base {start + bases.find(_PROTEIN) + 1}, "
                        "which is no code of a nucleotide; is it a protein file?"
                    )
                if bases:
                    yield Piece(record, name, start, bases)
                    start, total = start + len(bases), total + len(bases)
                line_start = text[-1] in b"\r\n"
            if mark >= 0:
                if not line_start:
                    raise InputError(f"{path}: record {name!r} has '>' inside a line; is a line break missing before it?")
                record, start, header = record + 1, 0, bytearray()
            position = stop + 1
    if header is not None:  # the file ends within a header line
        yield Piece(record, _first_word(header), 0, b"")
    if record < 0:
        raise InputError(f"{path}: the file is empty; remove it or get it again")
    if total == 0:
        raise InputError(f"{path}: no record has any bases (the last is {name!r}); remove the file or get it again")


def read_chunks(path: Path, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the contents of a plain or gzip file in chunks of at most `chunk_bytes`. Raises DamagedGzip."""
    with path.open("rb") as stream:
        raw = stream.read(max(chunk_bytes, len(GZIP_MAGIC)))
        unpacker = zlib.decompressobj(wbits=31) if raw.startswith(GZIP_MAGIC) else None
        while raw:
            if digest is not None:
                digest.update(raw)
            if unpacker is None:
                yield raw
            try:
                while unpacker is not None and raw:
                    if unpacker.eof:  # members may follow each other, with zeros between them
                        raw = raw.lstrip(b"\0")
                        if not raw:
                            break
                        unpacker = zlib.decompressobj(wbits=31)
                    if text := unpacker.decompress(raw, chunk_bytes):
                        yield text
                    raw = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            except zlib.error as error:
                raise DamagedGzip(f"the gzip data is corrupt ({error})") from None
            raw = stream.read(chunk_bytes)
        if unpacker is not None and not unpacker.eof:
            # A chunk that came out full may have left up to a few hundred bytes inside zlib.
            if text := unpacker.flush():
                yield text
            if not unpacker.eof:
                raise DamagedGzip("the gzip data is truncated")


def _line_end(chunk: bytes, position: int) -> int:
    """Where the line ends (LF, CR or CRLF: a LF left over is white space), or the chunk's length."""
    newline = chunk.find(b"\n", position)
    end = len(chunk) if newline < 0 else newline
    carriage = chunk.find(b"\r", position, end)
    return end if carriage < 0 else carriage


def _first_word(header: bytes | bytearray) -> str:
    """The record's name; control characters would break the tables that it is written to."""
    words = bytes(header).split(None, 1)
    text = words[0].decode("utf-8", "replace") if words else ""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
