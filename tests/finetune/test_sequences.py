from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from data_prep.cli import InputError
from finetune import sequences
from finetune.sequences import find_sequence, read_sequences

FASTA = ">one first record\nACGTac\nNNRT\n>two\nTTT\n"
CSV = 'label,sequence,name\n1,ACGTac,x\n\n0,"NNRT ",y\n'


def write(path: Path, text: str, compress: bool = False) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_formats_are_told_apart_by_content(tmp_path: Path, compress: bool) -> None:
    fasta = write(tmp_path / "genome.csv", "\n \n" + FASTA, compress)
    assert [(each.name, each.text) for each in read_sequences(fasta)] == [("one", "ACGTACNNNT"), ("two", "TTT")]
    table = write(tmp_path / "table.fa", "\ufeff" + CSV, compress)
    assert [(each.name, each.text) for each in read_sequences(table)] == [("row-1", "ACGTac"), ("row-2", "NNRT")]
    assert [each.text for each in read_sequences(table, column="name")] == ["x", "y"]
    assert [each.where for each in read_sequences(table)] == [f"{table}, line 2", f"{table}, line 4"]


@pytest.mark.parametrize("text", [FASTA, "sequence\nACGTACNNNT\nTTT\n"])
def test_windows(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "file", text)
    first, second = (each.name for each in read_sequences(path))

    def windows(window: int, least: int = 1) -> list[tuple[str, str]]:
        return [(each.name, each.text) for each in read_sequences(path, window=window, least=least)]

    two = (second, "TTT")
    assert windows(4) == [(f"{first}:0-4", "ACGT"), (f"{first}:4-8", "ACNN"), (f"{first}:8-10", "NT"), two]
    assert windows(4, least=3) == [(f"{first}:0-4", "ACGT"), (f"{first}:4-10", "ACNNNT"), two]
    assert windows(5) == [(f"{first}:0-5", "ACGTA"), (f"{first}:5-10", "CNNNT"), two]
    assert windows(10) == windows(99) == [(first, "ACGTACNNNT"), two]


def test_of_a_chromosome_no_more_than_a_window_is_held(tmp_path: Path) -> None:
    path = write(tmp_path / "chromosome.fa", ">c\n" + "ACGT" * 10_000_000, compress=True)
    tracemalloc.start()
    count = sum(len(each.text) for each in read_sequences(path, window=1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 40_000_000 and peak < 16 << 20
    with pytest.raises(InputError, match=r"chromosome.fa, record 'c': over 5,000 bases, .*--window"):
        list(read_sequences(path, most=5000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (">a\nACGT\n>b\n>c\nA\n", "record 'b': the sequence is empty"),
        (">a\nMKLV\n", "record 'a' has 'L'"),
        ("sequence,label\n", "has a header but no rows"),
        ("seq,label\nACGT,1\n", "line 1: needs one column 'sequence', the header is 'seq,label'; .*--column"),
        ("sequence,label\nACGT\n", "line 2: 1 fields where the header has 2"),
        ("sequence,label\nACGT,1\n,1\n", "line 3: the sequence is empty"),
        ('sequence,label\nACGT,"1\n', "line 2: not CSV"),
    ],
)
def test_what_can_not_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_sequences(write(tmp_path / "file", text)))


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "file", CSV * 1000, compress=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"gzip data is (truncated|damaged)"):
        list(read_sequences(path))
    path.write_bytes(b"sequence\n\xff\xfe\n")
    with pytest.raises(InputError, match="after line 0: not text"):
        list(read_sequences(path))
    monkeypatch.setattr(sequences, "LINE_LETTERS", 100)
    with pytest.raises(InputError, match=r"line 2: over .* FASTA"):
        list(read_sequences(write(path, "sequence\n" + "A" * 200)))
    with pytest.raises(InputError, match="not found"):
        list(read_sequences(tmp_path / "absent"))


def test_one_record_or_a_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "genome.fa", FASTA + ">two:1-2\nCCCCC\n>one\nGG\n")

    def found(record: str | None, most: int | None = None) -> tuple[str, str]:
        each = find_sequence(path, record, most=most)
        return each.name, each.text

    assert found("one") == ("one", "ACGTACNNNT")  # the first of this name
    assert found("one:1-5") == ("one:1-5", "CGTA")
    assert found("one:8-10", most=2) == ("one:8-10", "NT")
    assert found("two:1-2") == ("two:1-2", "T")  # of `two`, which comes before the record of this very name
    for record, message in {
        None: "several sequences .one, two, .*--record",
        "three": "no record 'three'; it has one, two, two:1-2, one",
        "one:3-11": "has 10 bases, of which 3-11 is no part",
        "one:5-5": "is no part",
    }.items():
        with pytest.raises(InputError, match=message):
            found(record)
    with pytest.raises(InputError, match=r"over 9 bases, .*--record NAME:START-END"):
        found("one", most=9)
    alone = write(tmp_path / "alone.csv", "sequence\nACGT\n")
    assert find_sequence(alone, None).text == find_sequence(alone, "row-1").text == "ACGT"
