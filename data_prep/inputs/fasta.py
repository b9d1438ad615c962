"""Reads FASTA files of any size in constant memory: pieces of cleaned bases, a chunk at a time.

Libraries for short reads hold a whole record, which is 250 MB for a human chromosome. Here a file, plain or gzip
(told by its first bytes; several members, as bgzip writes them, are fine), passes through in chunks of 1 MiB, and a
chunk is cleaned by `bytes.translate` and `bytes.find` at C speed, whether its records are wrapped or stand on one
line.

Cleaned bases are upper case; every other letter, digit or sign becomes N (IUPAC codes, masks, gaps, U), for the caller
to cut at, and white space goes. What can't stand in a sequence is an error, because it would become a dataset of Ns:
letters that only proteins have, `;` (comment lines of old FASTA), and bytes that are no ASCII text, such as the zeros that
a crash or a broken download leaves.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from data_prep.cli import InputError

CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
# The empty block at the end of what bgzip writes (SAM specification, section 4.1.2): a file without it was cut.
BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
HEADER_BYTES = 1000  # of a header line are kept: a broken file may be one "header" of gigabytes
PROTEIN_LETTERS = b"EFILPQZJO*"
WHITESPACE = b" \t\r\n\v\f"
UTF8_MARK = b"\xef\xbb\xbf"  # that some editors begin a text with
_REFUSED = ord("!")
_CLEAN = bytearray(b"N" * 256)
for _letter in b"ACGT":
    _CLEAN[_letter] = _CLEAN[_letter + 32] = _letter
for _letter in (*PROTEIN_LETTERS, *PROTEIN_LETTERS.lower(), *b";", *range(32), *range(127, 256)):
    _CLEAN[_letter] = _REFUSED
_REFUSED_LETTER = re.compile(rb"[EFILPQZJO*;\x00-\x08\x0e-\x1f\x7f-\xff]", re.IGNORECASE)


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


class NotNucleotides(Exception):
    """The text has something that no nucleotide sequence has. The message says what, where, and what to do."""


def clean(text: bytes, start: int = 0) -> bytes:
    """Only the bases of `text`: A, C, G, T, and N for any other letter, without white space.

    `start` is the number of bases before the text. Raises NotNucleotides.
    """
    bases = text.translate(_CLEAN, WHITESPACE)
    if _REFUSED in bases:
        found = _REFUSED_LETTER.search(text)
        letter = found[0] if found else b"!"
        place = f"at base {start + bases.find(_REFUSED) + 1}"
        if letter == b";":
            raise NotNucleotides(f"';' {place}; FASTA has no comment lines any more, remove them: sed '/^;/d'")
        if letter < b" " or letter > b"~":
            raise NotNucleotides(f"the byte 0x{letter.hex()} {place}, which is no text; is the file damaged?")
        raise NotNucleotides(f"{letter.decode()!r} {place}, which is no code of a nucleotide; is it a protein file?")
    return bases


class Point(NamedTuple):
    """A place in a file's text at which reading can begin, and what is known there. It is in no header."""

    offset: int  # bytes of text, uncompressed, before it
    record: int  # the record that it is in; -1 before the first
    name: str
    start: int  # bases of that record before it
    crc32: int  # of the text before it


BEGIN = Point(0, -1, "", 0, 0)
POINT_BYTES = 1 << 24  # of text between two points at least


class Counted:
    """Passes chunks of text on and counts them."""

    def __init__(self, chunks: Iterable[bytes], at: Point = BEGIN) -> None:
        self.chunks, self.offset, self.crc32 = chunks, at.offset, at.crc32

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            self.offset, self.crc32 = self.offset + len(chunk), zlib.crc32(chunk, self.crc32)
            yield chunk


def read_fasta(
    path: Path, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES, points: list[Point] | None = None
) -> Iterator[Piece]:
    """Yield the file's bases in order; how they are cut into pieces depends on chunks and means nothing.

    `digest` is fed the raw bytes as they are read, so that one pass gives bases and checksum. `points` gets places to read
    from later: the begin of the text, others at least POINT_BYTES apart, and the end.
    Raises InputError naming file and record.
    """
    chunks = read_chunks(path, digest=digest, chunk_bytes=chunk_bytes)
    last, total = None, 0
    for piece in parse_fasta(path, chunks, points=points):
        last, total = piece, total + len(piece.bases)
        yield piece
    if last is None:
        raise InputError(f"{path}: the file is empty; remove it or get it again")
    if total == 0:
        raise InputError(f"{path}: no record has any bases (the last is {last.name!r}); remove the file or get it again")


def parse_fasta(
    path: Path, chunks: Iterable[bytes], at: Point = BEGIN, points: list[Point] | None = None
) -> Iterator[Piece]:
    """As `read_fasta`, of the text in `chunks`, which begins at the point `at`; it may have no bases."""
    record, name, start = at.record, at.name, at.start
    header: bytearray | None = None  # the header line being read, which may span chunks
    line_start = True
    counted = Counted(chunks, at)
    chunks = iter(counted if points is not None else chunks)
    if at == BEGIN:
        chunks = without_mark(path, chunks)
    while True:
        if points is not None and header is None and (not points or counted.offset >= points[-1].offset + POINT_BYTES):
            points.append(Point(counted.offset, record, name, start, counted.crc32))
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
                try:
                    bases = clean(text, start)
                except NotNucleotides as refused:
                    raise InputError(f"{path}: record {name!r} has {refused}") from None
                if bases:
                    yield Piece(record, name, start, bases)
                    start += len(bases)
                line_start = text[-1] in b"\r\n"
            if mark >= 0:
                if not line_start:
                    raise InputError(f"{path}: record {name!r} has '>' inside a line; is a line break missing before it?")
                record, start, header = record + 1, 0, bytearray()
            position = stop + 1
    if header is not None:  # the file ends within a header line
        yield Piece(record, _first_word(header), 0, b"")
    if points is not None:
        points.append(Point(counted.offset, record, name, start, counted.crc32))


def without_mark(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The text without the mark that some editors begin UTF-8 with; UTF-16 is an InputError."""
    rest, head = iter(chunks), b""
    for chunk in rest:
        head += chunk
        if len(head) >= len(UTF8_MARK):
            break
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    if head := head.removeprefix(UTF8_MARK):
        yield head
    yield from rest


def read_chunks(path: Path, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the contents of a plain or gzip file in chunks of at most `chunk_bytes`. Raises DamagedGzip."""
    with path.open("rb") as stream:
        tail, raw = b"", stream.read(max(chunk_bytes, len(BGZF_END)))
        unpacker = zlib.decompressobj(wbits=31) if raw.startswith(GZIP_MAGIC) else None
        bgzf = raw.startswith(BGZF_END[:4]) and raw[12:14] == BGZF_END[12:14]
        while raw:
            tail = (tail + raw[-len(BGZF_END) :])[-len(BGZF_END) :]
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
        # A chunk that came out full may have left up to a few hundred bytes inside zlib.
        if unpacker is not None and not unpacker.eof and (text := unpacker.flush()):
            yield text
        if (unpacker is not None and not unpacker.eof) or (bgzf and tail != BGZF_END):
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
