"""Rows of CSV files are records: whatever stands around the column, and however the file is cut, packed and ended."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import InputError
from data_prep.inputs.csv_input import ROW_BYTES, read_csv
from data_prep.inputs.fasta import UTF8_MARK
from tests.data_prep.inputs.test_fasta import LETTERS, clean

texts = st.text('aé,"\n\r\x0b\u2028 >', max_size=4)  # of other columns: what a careless splitter would cut at


def read(path: Path, chunk_bytes: int = 1 << 20) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for piece in read_csv(path, chunk_bytes=chunk_bytes):
        if not piece.bases:
            found.append((piece.name, b""))
        name, bases = found[piece.record]
        assert (piece.record, piece.name, piece.start) == (len(found) - 1, name, len(bases))
        found[piece.record] = (name, bases + piece.bases)
    return found


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(texts, st.text(LETTERS, max_size=9), texts), max_size=5),
    # Quoted only where needed, Python's writer leaves a CR bare when lines end in LF, which is no CSV.
    form=st.sampled_from([("\n", True), ("\r\n", True), ("\r", True), ("\r\n", False)]),
    mark=st.booleans(),
    final=st.booleans(),
    chunk_bytes=st.integers(1, 9),
    packed=st.booleans(),
)
def test_same_rows_whatever_the_form(
    rows: list[tuple[str, str, str]], form: tuple[str, bool], mark: bool, final: bool, chunk_bytes: int, packed: bool
) -> None:
    end, quoting = form[0], csv.QUOTE_ALL if form[1] else csv.QUOTE_MINIMAL
    rows = [*rows, ("", "ACGT", "")]  # a file without any base is an error
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=end, quoting=quoting).writerows([("before", "sequence", "after"), *rows])
    data = stream.getvalue().encode()
    data = UTF8_MARK * mark + (data if final else data.removesuffix(end.encode()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        path.write_bytes(gzip.compress(data[:7]) + gzip.compress(data[7:]) if packed else data)
        expected = [(f"row-{number + 1}", clean(row[1])) for number, row in enumerate(rows)]
        assert read(path, chunk_bytes) == read(path) == expected


def test_gue_and_its_blank_last_line(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"sequence,label\nACGT\t,0\n,1\nacgtnRYU-,1\n\n")
    digest = hashlib.sha256()
    pieces = [(piece.record, piece.name, piece.bases) for piece in read_csv(path, digest=digest) if piece.bases]
    assert pieces == [(0, "row-1", b"ACGT"), (2, "row-3", b"ACGTNNNNN")]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "the file is empty"),
        (UTF8_MARK, "the file is empty"),
        (b"\nsequence\nACGT\n", "the file is empty"),
        (b"seq,label\nACGT,0\n", "needs one column 'sequence' in its first line, which has 'seq', 'label'"),
        (b"sequence;label\nACGT;0\n", "which has 'sequence;label'"),
        (b"sequence,sequence\nA,C\n", "needs one column 'sequence'"),
        (b"sequence,label\n", "no row has any bases"),
        (b"sequence,label\n,0\n", "no row has any bases"),
        (b"label,sequence\n0,ACGT\n1\n", "line 3: 1 fields where the header has 2"),
        (b"sequence,label\nACGT,0\nMKVL,1\n", "line 3: the sequence has 'L' at base 4"),
        (b"sequence\nAC\xffGT\n", "line 2: is not UTF-8 text"),
        (b'sequence,label\n"ACGT"A,0\n', "line 2: not CSV"),
        (b'sequence,label\n"ACGT,0\n', "not CSV (unexpected end of data)"),
        (gzip.compress(b"sequence\nACGT\n", mtime=0)[:-1], "the gzip data is truncated, after line 2"),
        ("sequence\nACGT\n".encode("utf-16"), "is UTF-16 text"),
        (b"sequence,label\n" + b"A" * (ROW_BYTES + (1 << 20)) + b",1\n", "line 2: over 16 MiB"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, contents: bytes, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(contents)
    for chunk_bytes in (1, 1 << 20) if len(contents) < 1000 else (1 << 20,):
        with pytest.raises(InputError) as caught:
            read(path, chunk_bytes)
        assert str(path) in str(caught.value)
        assert words in str(caught.value)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"sequence,label\n" + (b"ACGT" * 25_000 + b",1\n") * 200)
    tracemalloc.start()
    total = sum(len(piece.bases) for piece in read_csv(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20_000_000
    assert peak < 8e6
