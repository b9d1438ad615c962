"""The reader must give the same bases whatever the chunks, line ends and compression, and name what is wrong."""

from __future__ import annotations

import gzip
import hashlib
import random
import struct
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import InputError
from data_prep.inputs.fasta import UTF8_MARK, read_fasta

LETTERS = "ACGTacgtNnRYSWKMBDHVU-.X"
records = st.lists(
    st.tuples(
        st.text("abc|. ", max_size=6),  # the header
        st.lists(st.text(LETTERS, max_size=12), max_size=5),  # the lines; empty ones too
    ),
    min_size=1,
    max_size=4,
)


def read(path: Path, chunk_bytes: int = 1 << 20) -> list[tuple[str, bytes]]:
    """Names and bases of all records, after checking that pieces are numbered and placed without a gap."""
    found: list[tuple[str, bytes]] = []
    for piece in read_fasta(path, chunk_bytes=chunk_bytes):
        if not piece.bases:
            assert piece.record == len(found)
            found.append((piece.name, b""))
        name, bases = found[piece.record]
        assert (piece.record, piece.name, piece.start) == (len(found) - 1, name, len(bases))
        found[piece.record] = (name, bases + piece.bases)
    return found


def clean(text: str) -> bytes:
    return "".join(letter if letter in "ACGT" else "N" for letter in text.upper()).encode()


@settings(max_examples=150, deadline=None)
@given(
    records=records,
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    final=st.booleans(),
    chunk_bytes=st.integers(1, 9),
    members=st.integers(0, 3),
)
def test_same_bases_whatever_the_chunks(
    records: list[tuple[str, list[str]]], end: str, final: bool, chunk_bytes: int, members: int
) -> None:
    records = [*records, ("last", ["ACGT"])]  # a file without any base is an error
    text = end.join(f">{header}{end}{end.join(lines)}" for header, lines in records) + (end if final else "")
    data = text.encode()
    cut = len(data) // max(members, 1) + 1
    if members:
        data = b"".join(gzip.compress(data[start : start + cut]) for start in range(0, len(data), cut))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.fa"
        path.write_bytes(data)
        expected = [((header.split() or [""])[0], clean("".join(lines))) for header, lines in records]
        assert read(path, chunk_bytes) == read(path) == expected


def test_digest_is_of_the_file_as_it_lies_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.fa.gz"
    path.write_bytes(gzip.compress(b">a\nACGT\n") + b"\0" * 700)
    digest = hashlib.sha256()
    assert [piece.bases for piece in read_fasta(path, digest=digest, chunk_bytes=64)] == [b"", b"ACGT"]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("width", [60, 30_000_000])
def test_memory_does_not_grow_with_the_record(tmp_path: Path, width: int, compressed: bool) -> None:
    path = tmp_path / "x.fa"
    line = b"ACGT" * 15 + b"\n" if width == 60 else b"ACGT" * 15
    with gzip.open(path, "wb", 1) if compressed else path.open("wb") as stream:
        stream.write(b">long\n")
        for _ in range(50):
            stream.write(line * 10_000)
    tracemalloc.start()
    total = sum(len(piece.bases) for piece in read_fasta(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 30_000_000
    assert peak < 8e6


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (gzip.compress(b"", mtime=0), "the file is empty"),
        (b">only\n>headers\n\n", "no record has any bases (the last is 'headers')"),
        (b"ACGT\n>late\nACGT\n", "without a '>' header"),
        (b">ok\nACGT\n>pep1 a protein\nMKVL\n", "'pep1' has 'L' at base 4"),
        (b">ok\nACGT\n>pep2\nac\ntqa", "'pep2' has 'q' at base 4"),
        (b">ok\nACGT*\n", "'ok' has '*' at base 5"),
        (b">one\nACGT>two\nACGT\n", "'one' has '>' inside a line"),
        (b">", "no record has any bases (the last is '')"),
        (b";made by a program of 1988\n>a\nACGT\n", "without a '>' header"),
        (b">a\nACGT\n;a comment\nACGT\n", "'a' has ';' at base 5; FASTA has no comment lines"),
        (b">a\nACGT\n" + bytes(9), "'a' has the byte 0x00 at base 5, which is no text"),
        (b">a\nAC\xc2\xa0GT\n", "'a' has the byte 0xc2 at base 3"),
        (b">a\nACGT\n\x1a", "'a' has the byte 0x1a at base 5"),
        (bytes(9), "without a '>' header"),
        (UTF8_MARK, "the file is empty"),
        (">a\nACGT\n".encode("utf-16"), "is UTF-16 text"),
        (">a\nACGT\n".encode("utf-16-le"), "has the byte 0x00 at base 1"),
        (gzip.compress(">a\nACGT\n".encode("utf-16"), mtime=0), "is UTF-16 text"),
        (b"BZh91AY&SY", "without a '>' header"),
    ],
)
def test_bad_files_are_named_with_their_record(tmp_path: Path, contents: bytes, words: str) -> None:
    path = tmp_path / "bad.fa"
    path.write_bytes(contents)
    for chunk_bytes in (1, 1 << 20):
        with pytest.raises(InputError) as caught:
            read(path, chunk_bytes)
        assert str(path) in str(caught.value)
        assert words in str(caught.value)


def test_damaged_gzip_is_named_with_the_record_reached(tmp_path: Path) -> None:
    bases = "".join(random.Random(0).choices("ACGT", k=200_000)).encode()
    whole = gzip.compress(b">first\nACGT\n>second\n" + bases)
    path = tmp_path / "bad.fa.gz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for data, words in (
        (whole[:-1], "truncated, in record 'second' at base 200000"),
        (whole[: len(whole) // 2], "truncated, in record 'second'"),
        (whole[:5], "truncated, before the first record"),
        (bytes(flipped), "corrupt"),
        (whole + b"garbage", "corrupt"),
    ):
        path.write_bytes(data)
        for chunk_bytes in (1 << 10, 1 << 20):
            with pytest.raises(InputError, match=r"bad\.fa\.gz") as caught:
                read(path, chunk_bytes)
            assert words in str(caught.value)


def bgzf(text: bytes, block_bytes: int = 0xFF00) -> bytes:
    """BGZF by section 4.1 of the SAM specification: gzip members that tell their size, and an empty one at the end."""
    blocks = []
    for start in range(0, len(text) + block_bytes, block_bytes):
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(text[start : start + block_bytes]) + packer.flush()
        extra = b"BC" + struct.pack("<HH", 2, len(body) + 25)
        trailer = struct.pack("<II", zlib.crc32(text[start : start + block_bytes]), len(text[start : start + block_bytes]))
        blocks.append(b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H", 6) + extra + body + trailer)
    return b"".join(blocks)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_bgzip(tmp_path: Path, chunk_bytes: int) -> None:
    bases = "".join(random.Random(1).choices("ACGT", k=150_000 if chunk_bytes > 1 else 10_000)).encode()
    data = bgzf(b">chr1\n" + bases + b"\n")
    assert gzip.decompress(data)[6:-1] == bases
    end = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")  # as the specification prints it
    assert bgzf(b"") == end == data[-28:]
    path = tmp_path / "x.fa.gz"
    for contents in (data, end + data + end):
        path.write_bytes(contents)
        assert read(path, chunk_bytes) == [("chr1", bases)]
    path.write_bytes(data + bgzf(b">chr2\nAC\n"))
    assert read(path, chunk_bytes) == [("chr1", bases), ("chr2", b"AC")]
    # Cut within a block, and between the last one with text and the end marker.
    for cut in (len(data) // 2, len(data) - 28):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"x\.fa\.gz: the gzip data is truncated, in record 'chr1'"):
            read(path, chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_byte_order_mark(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(UTF8_MARK + b">a\nACGT\n")
    assert read(path, chunk_bytes) == [("a", b"ACGT")]


def test_headers_are_cut_at_white_space(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(b">chr1\tH. sapiens >GRCh38; x\nAC\n> chr2 y\nGT\n>\tz\r\n>same\nA\n>same\nC\n")
    assert read(path) == [("chr1", b"AC"), ("chr2", b"GT"), ("z", b""), ("same", b"A"), ("same", b"C")]


def test_names_can_stand_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(b">a\x01b\xff more\nA\n>" + b"x" * 5_000_000 + b"\nA\n>\nA")
    assert [(name.rstrip("x"), len(name), bases) for name, bases in read(path)] == [
        ("a?b\N{REPLACEMENT CHARACTER}", 4, b"A"),
        ("", 1000, b"A"),
        ("", 0, b"A"),
    ]
