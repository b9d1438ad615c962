"""Sequences with their names, one after the other, from FASTA or CSV files of any size.

FASTA is read as everywhere in the project: upper case, and every letter other than A, C, G, T is N. Letters of a CSV file
are left as they are, as in fine-tuning; its rows are called row-1, row-2, ... The two are told apart by their first byte,
and either may be gzip. Of a record of FASTA that is cut into windows, one window and a chunk of the file are held; a row of
a CSV file is held as a whole.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_prep.cli import InputError
from data_prep.inputs.fasta import GZIP_MAGIC, DamagedGzip, read_chunks, read_fasta, without_mark

COLUMN = "sequence"
LINE_LETTERS = 1 << 24  # of a CSV file: a row is held as a whole; longer sequences belong into FASTA files
_OTHER = re.compile(r"[^ACGT]")
_REGION = re.compile(r"(.+):(\d+)-(\d+)")
_PART = "give a part: --record NAME:START-END"
_TEXT: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}


def has_other_letters(text: str) -> bool:
    """Whether there is another letter than A, C, G, T: most tokenizers make [UNK] of it."""
    return bool(_OTHER.search(text))


class Named(NamedTuple):
    """A sequence."""

    name: str
    text: str
    where: str  # file and record or line, for messages
    remedy: str = "give a shorter one"  # where it is too long


class _Piece(NamedTuple):
    """Consecutive letters of one record. Every record yields an empty piece first."""

    record: int
    name: str
    start: int
    text: str
    where: str


def read_sequences(
    path: Path, *, column: str = COLUMN, window: int | None = None, most: int | None = None, least: int = 1
) -> Iterator[Named]:
    """Yield the sequences of a file in order.

    Args:
        column: of a CSV file, which holds the sequences.
        window: bases. A longer record is cut into pieces of so many, called NAME:start-end (from 0, the end not included).
        most: bases. Without a window, a record with more is an InputError as soon as that is known.
        least: bases that a sequence needs. The last window of a record takes fewer left over to itself.

    Raises InputError naming file and record or line; a record without bases is one.
    """
    for head, pieces in _records(path, column):
        yield from _windows(head, pieces, window, most, least)


def _windows(head: _Piece, pieces: Iterable[_Piece], window: int | None, most: int | None, least: int) -> Iterator[Named]:
    """The windows of one record, or the record as it is."""
    start, held, remedy = 0, "", "cut long sequences: --window BASES"
    for piece in pieces:
        text, position = held + piece.text, 0
        while window is not None and len(text) - position >= window + least:
            name = f"{head.name}:{start}-{start + window}"
            yield Named(name, text[position : position + window], head.where, remedy)
            start, position = start + window, position + window
        held = text[position:]
        if window is None and most is not None and len(held) > most:
            raise InputError(f"{head.where}: over {most:,} bases, which are more tokens than the model takes; {remedy}")
    if not held:
        raise InputError(f"{head.where}: the sequence is empty; remove it")
    yield Named(f"{head.name}:{start}-{start + len(held)}" if start else head.name, held, head.where, remedy)


def find_sequence(path: Path, record: str | None, *, column: str = COLUMN, most: int | None = None) -> Named:
    """The record of this name, or a part of it: NAME:START-END (from 0, the end not included). None: the only one.

    Raises InputError: there is none, or it has over `most` bases.
    """
    region = _REGION.fullmatch(record or "")
    found: Named | None = None
    others: list[str] = []
    for head, pieces in _records(path, column):
        if found is not None:
            raise InputError(f"{path}: has several sequences ({found.name}, {head.name}, ...); choose one: --record NAME")
        if record is None:
            found = _part(head, pieces, 0, None, most)
        elif record == head.name:
            return _part(head, pieces, 0, None, most)
        elif region and region[1] == head.name:
            return _part(head, pieces, int(region[2]), int(region[3]), most)
        elif len(others) < 5:
            others.append(head.name)
    if found is None:
        raise InputError(f"{path}: has no record {record!r}; it has {', '.join(others)}")
    return found


def _part(head: _Piece, pieces: Iterable[_Piece], first: int, end: int | None, most: int | None) -> Named:
    """Letters `first` to `end` of one record."""
    taken, bases = "", 0
    for piece in pieces:
        taken += piece.text[max(first - piece.start, 0) : None if end is None else max(end - piece.start, 0)]
        bases += len(piece.text)
        if most is not None and len(taken) > most:
            raise InputError(f"{head.where}: over {most:,} bases, more than the model takes; {_PART}")
    if end is not None and not first < end <= bases:
        raise InputError(f"{head.where}: has {bases:,} bases, of which {first}-{end} is no part")
    if not taken:
        raise InputError(f"{head.where}: the sequence is empty; choose another one")
    return Named(head.name if end is None else f"{head.name}:{first}-{end}", taken, head.where, _PART)


def _records(path: Path, column: str) -> Iterator[tuple[_Piece, Iterator[_Piece]]]:
    """The empty piece of each record and its others, which are gone when the next record is asked for."""
    for _, group in groupby(_pieces(path, column), key=attrgetter("record")):
        pieces = iter(group)
        yield next(pieces), pieces


def _pieces(path: Path, column: str) -> Iterator[_Piece]:
    """The file's letters in order, of either format."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a file, and a pipe can not be read twice' if path.exists() else 'not found'}")
    if not is_fasta(path):
        yield from _read_csv(path, column)
        return
    for piece in read_fasta(path):
        yield _Piece(piece.record, piece.name, piece.start, piece.bases.decode(), f"{path}, record {piece.name!r}")


def is_fasta(path: Path) -> bool:
    """Whether the first byte that is no white space is `>`."""
    try:
        for chunk in without_mark(path, read_chunks(path)):
            if text := chunk.lstrip():
                return text.startswith(b">")
    except DamagedGzip as damage:
        raise InputError(f"{path}: {damage}; get the file again") from None
    raise InputError(f"{path}: the file is empty; expected FASTA, or CSV with a header line")


def _read_csv(path: Path, column: str) -> Iterator[_Piece]:
    csv.field_size_limit(LINE_LETTERS)  # of the whole process; the default, 128 kB, is less than a gene can have
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
    with gzip.open(path, "rt", **_TEXT) if packed else path.open(**_TEXT) as stream:
        rows = csv.reader(_lines(stream), strict=True)
        record = -1
        try:
            header = [name.strip() for name in next(rows)]
            if header.count(column) != 1:
                raise InputError(
                    f"{path}, line 1: needs one column {column!r}, the header is {','.join(header)[:100]!r}; "
                    "name it: --column or --columns"
                )
            place = header.index(column)
            for record, row in enumerate(filter(None, rows)):
                where = f"{path}, line {rows.line_num}"
                if len(row) != len(header):
                    raise InputError(f"{where}: {len(row)} fields where the header has {len(header)}")
                yield _Piece(record, f"row-{record + 1}", 0, "", where)
                yield _Piece(record, f"row-{record + 1}", 0, row[place].strip(), where)
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}: not CSV: {error}") from None
        except _LongLine:
            raise InputError(
                f"{path}, line {rows.line_num + 1}: over {LINE_LETTERS >> 20} Mi letters; "
                "such long sequences belong into a FASTA file"
            ) from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: after line {rows.line_num}: not text (UTF-8)") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: the gzip data is damaged ({error}); get the file again") from None
    if record < 0:
        raise InputError(f"{path}: has a header but no rows")


class _LongLine(Exception):
    """A line has more than LINE_LETTERS letters."""


def _lines(stream: IO[str]) -> Iterator[str]:
    while line := stream.readline(LINE_LETTERS):
        if len(line) == LINE_LETTERS and not line.endswith("\n"):
            raise _LongLine
        yield line
