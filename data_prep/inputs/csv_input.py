"""Reads the `sequence` column of a CSV file as if each row were a record of a FASTA file: for further pre-training on
GUE, whose tasks are files `train.csv` with the header `sequence,label`.

Quoted fields, other columns before and after, any line ends, a byte order mark and gzip are fine; the letters are cleaned
as those of FASTA. Records are named `row-1`, `row-2`, ... by their row below the header. A row whose sequence is empty is an
empty record; a blank line is no row, as in every reader of CSV.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.cli import InputError
from data_prep.inputs.fasta import (
    BEGIN,
    CHUNK_BYTES,
    Counted,
    DamagedGzip,
    Digest,
    NotNucleotides,
    Piece,
    Point,
    clean,
    read_chunks,
    without_mark,
)

COLUMN = "sequence"
ROW_BYTES = 1 << 24  # a row is held as a whole; longer sequences belong into FASTA files


def is_csv(path: Path) -> bool:
    """Whether the name says that the file is CSV, plain or gzip."""
    return path.name.lower().removesuffix(".gz").endswith(".csv")


class _LongLine(Exception):
    """A line has more than ROW_BYTES bytes."""


def read_csv(
    path: Path, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES, points: list[Point] | None = None
) -> Iterator[Piece]:
    """Yield the file's sequences as `read_fasta` does, each row a record; memory is a row and a chunk.

    `points` gets the begin of the text and its end. Raises InputError naming file and line.
    """
    csv.field_size_limit(2 * ROW_BYTES)  # of the whole process; the default, 128 kB, is less than a gene can have
    counted = Counted(read_chunks(path, digest=digest, chunk_bytes=chunk_bytes))
    rows = csv.reader(_lines(without_mark(path, counted)), strict=True)
    total = record = 0
    piece = Piece(-1, "", 0, b"")
    try:
        header = next(rows, [])
        column = _column(path, header)
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} fields where the header has {len(header)}; mend the row")
            try:
                bases = clean(row[column].encode())
            except NotNucleotides as refused:
                raise InputError(f"{where}: the sequence has {refused}") from None
            name = f"row-{record + 1}"
            yield Piece(record, name, 0, b"")
            piece = Piece(record, name, 0, bases)
            if bases:
                yield piece
            record, total = record + 1, total + len(bases)
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error}); mend the file") from None
    except _LongLine:
        raise InputError(
            f"{path}, line {rows.line_num + 1}: over {ROW_BYTES >> 20} MiB; such long sequences belong into a FASTA file"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {rows.line_num + 1}: is not UTF-8 text; is the file damaged?") from None
    except DamagedGzip as damage:
        raise InputError(f"{path}: {damage}, after line {rows.line_num}; get the file again") from None
    if not total:
        raise InputError(f"{path}: no row has any bases in its column {COLUMN!r}; remove the file or get it again")
    if points is not None:
        points += [BEGIN, Point(counted.offset, piece.record, piece.name, len(piece.bases), counted.crc32)]


def _column(path: Path, header: list[str]) -> int:
    """Which column holds the sequences."""
    if not header:
        raise InputError(f"{path}: the file is empty; remove it or get it again")
    if header.count(COLUMN) != 1:
        found = ", ".join(map(repr, header))[:200]
        raise InputError(
            f"{path}: needs one column {COLUMN!r} in its first line, which has {found}; "
            "rename the column, or move the file out of --genomes"
        )
    return header.index(COLUMN)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text's lines with their ends (LF, CRLF, CR). `str.splitlines` would also cut at rarer characters."""
    rest = b""
    for chunk in chunks:
        if len(rest) + len(chunk) > ROW_BYTES + CHUNK_BYTES:
            raise _LongLine
        lines = (rest + chunk).splitlines(keepends=True)
        # The last line may go on in the next chunk; so may the line end of a CR.
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            yield line.decode()
    if rest:
        yield rest.decode()
