"""Reads a stretch of a genome without what stands before it, so that many tasks can share one file.

A scan of a file (genomes.py) notes points in its text from which it can be read. From a plain file, or one of bgzip that
lies beside its index (bgzip.py), a task reads the stretch between two points and nothing else. From other gzip files it has
to unpack all that stands before, but does not look at it. CSV files have no points but their begin and end.

The points hold a running checksum of the text: whatever a task has read was what the scan had read, or it is an error.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.cli import InputError
from data_prep.inputs import bgzip
from data_prep.inputs.csv_input import is_csv, read_csv
from data_prep.inputs.fasta import CHUNK_BYTES, GZIP_MAGIC, Counted, Piece, Point, parse_fasta, read_chunks

Place = tuple[int, int]  # number of a record, and of a base in it


def segment_around(points: Sequence[Point], first: Place, end: Place) -> tuple[Point, Point]:
    """The last point at or before the base `first`, and the first at or behind `end`, the base behind the last one."""
    places = [(point.record, point.start) for point in points]
    return points[bisect_right(places, first, hi=len(points) - 1) - 1], points[bisect_left(places, end)]


def read_segment(path: Path, first: Point, last: Point, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """Yield the pieces between two points of the file, of which a scan has given both.

    Raises InputError when, at the end of the segment, the text was not the same as at the scan.
    """
    if is_csv(path):
        points: list[Point] = []
        yield from read_csv(path, chunk_bytes=chunk_bytes, points=points)
        read = points[-1]
    else:
        text = Counted(_text(path, first.offset, last.offset, chunk_bytes), first)
        yield from parse_fasta(path, text, first)
        read = last._replace(offset=text.offset, crc32=text.crc32)
    if (read.offset, read.crc32) != (last.offset, last.crc32):
        raise InputError(f"{path}: has changed since it was scanned; choose another --out")


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
