from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from data_prep.cli import InputError
from finetune.vcf import Listed, letters, read_vcf

HEAD = "##fileformat=VCFv4.3\n##contig=<ID=a>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def row(*fields: object) -> str:
    return "\t".join(map(str, (*fields, ".", "PASS", "DP=9"))) + "\n"


ROWS = [
    row("a", 3, "rs1", "A", "C"),
    row("b", 1, ".", "acG", "a,<DEL>,AcGT"),
    row("a", 2, ".", "N", "<DEL>,*,.,G]17:198982],.A,C."),
    row("c", 9, ".", "R", "t"),
]


@pytest.mark.parametrize("compress", [False, True])
def test_what_stands_in_a_file(tmp_path: Path, compress: bool) -> None:
    data = (HEAD + "".join(ROWS)).replace("\n", "\r\n" if compress else "\n").encode()[: -1 - compress]  # no last line end
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data[:99]) + gzip.compress(data[99:]) if compress else data)
    found = list(read_vcf(path))
    assert [tuple(each[:5]) for each in found[:2]] == [(4, "a", 3, "rs1", "A"), (5, "b", 1, ".", "acG")]
    assert found[1].alts == ("a", "<DEL>", "AcGT")
    assert [letters(alt) for alt in found[1].alts] == ["A", None, "ACGT"]
    assert [letters(alt) for alt in found[2].alts] == [None] * 6
    assert letters(found[3].ref) == "N" and letters("t") == "T"


def test_a_list_of_all_is_read_by_contig_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "file.vcf"
    path.write_text(HEAD + "".join(ROWS) + ROWS[0])
    with (tmp_path / "spool").open("w+b") as stream:
        listed = Listed(path, stream)
        assert listed.contigs == ["a", "b", "c"] and listed.symbolic == 7 and listed.alleles == len(listed) + 7
        assert [number for number, _ in listed.within("a")] == [0, 4]  # the third has no letters
        assert [variant.alts for _, variant in listed.within("b")] == [("a", "<DEL>", "AcGT")]
        assert list(listed) == list(read_vcf(path))
        assert listed.first.tolist() == [0, 1, 4, 10, 11, 12]
    path.write_text(HEAD)
    with (tmp_path / "spool").open("w+b") as stream:
        assert len(Listed(path, stream)) == 0 == Listed(path, stream).alleles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line of columns, #CHROM"),
        ("##only\n", "has no line of columns, #CHROM"),
        (ROWS[0], "line 1: comes before the line of columns"),
        (HEAD.replace("\t", " "), "line 3: expected columns .* tabs"),
        (HEAD.replace("REF\tALT", "ALT\tREF"), "line 3: expected columns"),
        (HEAD + ROWS[0][:-6], "line 4: 7 columns where the #CHROM line has 8"),
        (HEAD + row("a", 0, ".", "A", "C"), "line 4: POS '0'"),
        (HEAD + row("a", "x", ".", "A", "C"), "line 4: POS 'x'"),
        (HEAD + ROWS[0] + row("a", 1, ".", "", "C"), "line 5: REF ''"),
        (HEAD + row("a", 1, ".", "<DEL>", "C"), "line 4: REF '<DEL>'"),
        (HEAD + row("a", 1, ".", "A", "C,"), "line 4: ALT ''"),
        (HEAD + row("a", 1, ".", "A", "C/T"), "line 4: ALT 'C/T'"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.vcf"
    path.write_text(text)
    with pytest.raises(InputError, match=f"file.vcf(, |: ){message}"):
        list(read_vcf(path))


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "file.vcf.gz"
    data = gzip.compress((HEAD + ROWS[0] * 1000).encode())
    path.write_bytes(data[:-30])
    with pytest.raises(InputError, match="truncated, after line"):
        list(read_vcf(path))
