"""Reads VCF files, plain, gzip or bgzip, a line at a time: the first five columns, which say what is where.

An alternative allele is taken if it is spelled out. Symbolic ones (`<DEL>`, `<*>`), `*`, `.` and breakends say that
something is there without saying which letters. Letters other than A, C, G, T are N, as in FASTA.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError
from data_prep.inputs.fasta import DamagedGzip, read_chunks, without_mark

COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT")
_LETTERS = re.compile(r"[ACGTNRYSWKMBDHV]+", re.IGNORECASE)
_OTHER = re.compile(r"[^ACGT]")


class Variant(NamedTuple):
    """A line of a VCF file, its columns as they stand there."""

    line: int
    chrom: str
    pos: int  # from 1
    id: str
    ref: str
    alts: tuple[str, ...]


def letters(allele: str) -> str | None:
    """The bases of an allele; None where it does not spell them."""
    return _OTHER.sub("N", allele.upper()) if _LETTERS.fullmatch(allele) else None


def read_vcf(path: Path) -> Iterator[Variant]:
    """Yield the file's lines in order. Raises InputError naming the line that is malformed."""
    fields, number = 0, 0
    try:
        for number, line in enumerate(_lines(path), 1):
            where = f"{path}, line {number}"
            if line.startswith(b"##") or not line.strip():
                continue
            if line.startswith(b"#"):
                fields = _header(where, line)
            elif not fields:
                raise InputError(f"{where}: comes before the line of columns, #CHROM POS ID REF ALT ...; is it a VCF file?")
            else:
                if (found := line.count(b"\t") + 1) != fields:
                    raise InputError(f"{where}: {found} columns where the #CHROM line has {fields}")
                yield _variant(where, number, line)
    except DamagedGzip as damage:
        raise InputError(f"{path}: {damage}, after line {number}; get the file again") from None
    if not fields:
        raise InputError(f"{path}: has no line of columns, #CHROM POS ID REF ALT ...; is it a VCF file?")


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in without_mark(path, read_chunks(path)):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _header(where: str, line: bytes) -> int:
    """The number of columns."""
    names = line.decode("utf-8", "replace").rstrip("\r").split("\t")
    if tuple(names[:5]) != COLUMNS:
        raise InputError(f"{where}: expected columns {' '.join(COLUMNS)} ... with tabs between them, found {names[:5]}")
    return len(names)


def _variant(where: str, number: int, line: bytes) -> Variant:
    try:
        chrom, pos, name, ref, alt = (field.decode() for field in line.rstrip(b"\r").split(b"\t", 5)[:5])
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not UTF-8 text; is the file damaged?") from None
    if not pos.isascii() or not pos.isdigit() or int(pos) < 1:
        raise InputError(f"{where}: POS {pos[:20]!r} is no position; they count from 1")
    if letters(ref) is None:
        raise InputError(f"{where}: REF {ref[:20]!r} is not made of A, C, G, T, N")
    alts = tuple(alt.split(","))
    for allele in alts:
        if letters(allele) is None and not _symbolic(allele):
            raise InputError(f"{where}: ALT {allele[:20]!r} is neither letters A, C, G, T, N nor a symbol such as <DEL>")
    return Variant(number, chrom, int(pos), name, ref, alts)


def _symbolic(allele: str) -> bool:
    return allele == "*" or allele[:1] in ("<", ".") or allele[-1:] == "." or "[" in allele or "]" in allele


class Listed:
    """All variants of a file, written to another one, to be read by contig or in order: 20 bytes each are in memory.

    Attributes:
        contigs: names of those in which an allele is spelled out, in order of appearance.
        first: int64 [variants + 1], the number of each one's first allele among the alternative alleles of all.
        symbolic: alternative alleles that are not spelled out.
    """

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self._stream, self.symbolic = path, stream, 0
        codes: dict[str, int] = {}
        offsets, contig, first = array("q"), array("i"), array("q", [0])
        for variant in read_vcf(path):
            spelled = sum(letters(alt) is not None for alt in variant.alts)
            self.symbolic += len(variant.alts) - spelled
            contig.append(codes.setdefault(variant.chrom, len(codes)) if spelled else -1)
            offsets.append(stream.tell())
            first.append(first[-1] + len(variant.alts))
            fields = (variant.line, variant.chrom, variant.pos, variant.id, variant.ref, ",".join(variant.alts))
            stream.write("\t".join(map(str, fields)).encode() + b"\n")
        self.contigs = list(codes)
        self.first: NDArray[np.int64] = np.array(first, dtype=np.int64)
        self._codes, self._offsets = codes, np.array(offsets, dtype=np.int64)
        self._contig: NDArray[np.int32] = np.array(contig, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def alleles(self) -> int:
        return int(self.first[-1])

    def within(self, contig: str) -> Iterator[tuple[int, Variant]]:
        """The number and the content of each variant of a contig that has an allele spelled out, in the file's order."""
        for number in np.flatnonzero(self._contig == self._codes[contig]).tolist():
            self._stream.seek(self._offsets[number])
            yield number, self._next()

    def __iter__(self) -> Iterator[Variant]:
        self._stream.seek(0)
        for _ in range(len(self)):
            yield self._next()

    def _next(self) -> Variant:
        line, chrom, pos, name, ref, alts = self._stream.readline()[:-1].decode().split("\t")
        return Variant(int(line), chrom, int(pos), name, ref, tuple(alts.split(",")))
