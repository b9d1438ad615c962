"""Reads a stretch of a genome without what stands before it, so that many tasks can share one file.

A scan of a file (genomes.py) notes points in its text from which it can be read. From a plain file, or one of bgzip that
lies beside its index (bgzip.py), a task reads the stretch between two points and nothing else. From other gzip files it has
to unpack all that stands before, but does not look at it. CSV files have no points but their begin and end.

The points hold a running checksum of the text: whatever a task has read was what the scan had read, or it is an error.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_prep.cli import InputError
from data_prep.inputs import bgzip
from data_prep.inputs.csv_input import is_csv, read_csv
from data_prep.inputs.fasta import CHUNK_BYTES, GZIP_MAGIC, Piece, Point, parse_fasta, read_chunks

Place = tuple[int, int]  # number of a record, and of a base in it


def segment_around(points: Sequence[Point], first: Place, end: Place) -> tuple[Point, ...]:
    """The points from the last at or before the base `first` to the first at or behind `end`, the base after the last."""
    places = [(point.record, point.start) for point in points]
    return tuple(points[bisect_right(places, first, hi=len(points) - 1) - 1 : bisect_left(places, end) + 1])


def read_segment(
    path: Path, *points: Point, chunk_bytes: int = CHUNK_BYTES, confirm: Callable[[Point], None] | None = None
) -> Iterator[Piece]:
    """Yield the pieces between the first and the last of two or more points of the file, which a scan has given.

    At each further point `confirm` is called with it if the text was the same as at the scan, or else InputError is raised:
    what was yielded since the last point can't be trusted.
    """
    first, last = points[0], points[-1]
    if is_csv(path):
        found: list[Point] = []
        yield from read_csv(path, chunk_bytes=chunk_bytes, points=found)
        _compare(path, found[-1], last, confirm)
        return
    text = _Checked(path, _text(path, first.offset, last.offset, chunk_bytes), points, confirm)
    yield from parse_fasta(path, text, first)
    text.finish()


class _Checked:
    """Passes the text of a segment on, and compares it with what was scanned at each of its points."""

    def __init__(
        self, path: Path, chunks: Iterator[bytes], points: Sequence[Point], confirm: Callable[[Point], None] | None
    ) -> None:
        self.path, self.chunks, self.confirm = path, chunks, confirm
        self.offset, self.crc32 = points[0].offset, points[0].crc32
        self.points = list(points[:0:-1])  # the next one last

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            while chunk:
                part, chunk = self._cut(chunk)
                self.offset, self.crc32 = self.offset + len(part), zlib.crc32(part, self.crc32)
                yield part
                while self.points and self.offset == self.points[-1].offset:
                    self._compare(self.points.pop())

    def finish(self) -> None:
        """The text has ended: it must be at the last point."""
        for point in reversed(self.points):
            self._compare(point)

    def _cut(self, chunk: bytes) -> tuple[bytes, bytes]:
        size = self.points[-1].offset - self.offset if self.points else len(chunk)
        return chunk[:size], chunk[size:]

    def _compare(self, point: Point) -> None:
        _compare(self.path, point._replace(offset=self.offset, crc32=self.crc32), point, self.confirm)


def _compare(path: Path, read: Point, scanned: Point, confirm: Callable[[Point], None] | None) -> None:
    if (read.offset, read.crc32) != (scanned.offset, scanned.crc32):
        index = bgzip.index_path(path)
        other = f", or {index} is the index of another file: remove it and run this again" if index.is_file() else ""
        raise InputError(f"{path}: has changed since it was scanned (choose another --out){other}")
    if confirm is not None:
        confirm(scanned)


def _text(path: Path, begin: int, end: int, chunk_bytes: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of the file's text."""
    with path.open("rb") as stream:
        packed = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        if not packed:
            stream.seek(begin)
            while begin < end and (chunk := stream.read(min(chunk_bytes, end - begin))):
                begin += len(chunk)
                yield chunk
            return
    place, chunks = 0, read_chunks(path, chunk_bytes=chunk_bytes)
    if begin and bgzip.index_path(path).is_file():
        place, chunks = begin, bgzip.open_at(path, begin)
    for chunk in chunks:
        if wanted := chunk[max(begin - place, 0) : end - place]:
            yield wanted
        place += len(chunk)
        if place >= end:
            return
