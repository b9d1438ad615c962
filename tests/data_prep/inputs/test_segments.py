"""From any point of a scan on, a file reads as it does from its start; what has changed in between is an error."""

from __future__ import annotations

import gzip
import io
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.cli import InputError
from data_prep.inputs import bgzip, fasta
from data_prep.inputs.fasta import Piece, Point, read_fasta
from data_prep.inputs.genomes import Genome, read_regions, scan
from data_prep.inputs.segments import read_segment, segment_around
from tests.data_prep.conftest import random_bases, wrapped
from tests.data_prep.inputs.test_fasta import records

Base = tuple[int, str, int, int]


def each_base(pieces: Iterable[Piece]) -> list[Base]:
    """Record, name, position and letter of every base."""
    return [
        (piece.record, piece.name, piece.start + number, letter)
        for piece in pieces
        for number, letter in enumerate(piece.bases)
    ]


def write(path: Path, data: bytes, form: str, block_bytes: int = 11) -> None:
    if form == "plain":
        path.write_bytes(data)
    elif form == "gzip":
        path.write_bytes(gzip.compress(data))
    else:
        stream = io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bgzip, "BLOCK_BYTES", block_bytes)
            index = bgzip.compress([data], stream)
        path.write_bytes(stream.getvalue())
        bgzip.index_path(path).write_bytes(index)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=records,
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
    form=st.sampled_from(["plain", "gzip", "bgzip"]),
    chunk_bytes=st.integers(1, 9),
    point_bytes=st.integers(1, 30),
    region_bases=st.integers(1, 9),
)
def test_from_any_point_on_as_from_the_start(
    monkeypatch: pytest.MonkeyPatch,
    records: list[tuple[str, list[str]]],
    end: str,
    mark: bool,
    form: str,
    chunk_bytes: int,
    point_bytes: int,
    region_bases: int,
) -> None:
    records = [*records, ("last", ["ACGT"])]
    text = end.join(f">{header}{end}{end.join(lines)}" for header, lines in records)
    data = fasta.UTF8_MARK * mark + text.encode()
    monkeypatch.setattr(fasta, "POINT_BYTES", point_bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.fa"
        write(path, data, form)
        points: list[Point] = []
        whole = each_base(read_fasta(path, chunk_bytes=chunk_bytes, points=points))
        assert points[0] == fasta.BEGIN and points[-1].offset == len(data)
        segments = [each_base(read_segment(path, *pair)) for pair in pairwise(points)]
        assert [base for segment in segments for base in segment] == whole
        for point in points[:-1]:
            tail = [base for base in whole if (base[0], base[2]) >= (point.record, point.start)]
            assert each_base(read_segment(path, point, points[-1], chunk_bytes=chunk_bytes)) == tail
        regions = list(read_regions(path, region_bases))
        for first, last in pairwise([*range(0, len(regions), 2), len(regions)]):
            wanted = regions[first:last]
            place = (wanted[-1].record, wanted[-1].start + len(wanted[-1].bases))
            segment = segment_around(points, (wanted[0].record, wanted[0].start), place)
            found = list(read_regions(path, region_bases, segment=segment))
            assert [region for region in found if wanted[0][:4] <= region[:4] <= wanted[-1][:4]] == wanted


def points_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Points about every 1,000 bytes."""
    monkeypatch.setattr(fasta, "POINT_BYTES", 1000)
    points: list[Point] = []
    list(read_fasta(path, chunk_bytes=500, points=points))
    return points


@pytest.mark.parametrize("form", ["plain", "bgzip"])
def test_a_segment_reads_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Whatever stands before a segment and behind it may be gone."""
    path = tmp_path / "x.fa"
    data = b">a\n" + wrapped(random_bases(1, 40_000), 60)
    write(path, data, form, 1000)
    points = points_of(path, monkeypatch)
    first, last = points[len(points) // 2 : len(points) // 2 + 2]
    expected = each_base(read_segment(path, first, last))
    assert len(expected) > 900
    lost = bytearray(path.read_bytes())
    third = len(lost) // 3
    lost[100:third] = bytes(third - 100)
    lost[2 * third :] = bytes(len(lost) - 2 * third)
    path.write_bytes(lost)
    assert each_base(read_segment(path, first, last)) == expected
    with pytest.raises(InputError, match=r"x\.fa"):
        list(read_regions(path, 700))


@pytest.mark.parametrize("form", ["plain", "gzip", "bgzip"])
def test_a_file_that_has_changed_since_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    path = tmp_path / "x.fa"
    data = b">a\n" + wrapped(random_bases(1, 40_000), 60)
    write(path, data, form, 1000)
    points = points_of(path, monkeypatch)
    middle = len(points) // 2
    place = points[middle].offset + 10
    other = data[:place] + data[place : place + 90].translate(bytes.maketrans(b"ACGT", b"CATG")) + data[place + 90 :]
    assert len(other) == len(data) and other != data
    for changed in (other, data[: points[middle].offset + 20]):
        write(path, changed, form, 1000)
        assert each_base(read_segment(path, points[0], points[1]))  # is as it was
        with pytest.raises(InputError, match=r"x\.fa: has changed since it was scanned"):
            list(read_segment(path, points[middle], points[middle + 1]))


def test_csv_is_one_segment(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"sequence\nACGT\nAACC\n")
    points = scan(Genome("x", "x", "x.csv", path, 19)).points
    assert len(points) == 2
    segment = segment_around(points, (1, 0), (1, 4))
    assert [region.bases for region in read_regions(path, 3, segment=segment)] == [b"ACG", b"T", b"AAC", b"C"]
    path.write_bytes(b"sequence\nACGT\nAACG\n")
    with pytest.raises(InputError, match=r"x\.csv: has changed since it was scanned"):
        list(read_regions(path, 3, segment=segment))
