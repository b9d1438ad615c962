"""Lists of genome stretches that training must not see, by their places in the genomes, not in one dataset.

    file<TAB>record<TAB>contig<TAB>length<TAB>start<TAB>end<TAB>against

One line a stretch: the FASTA file as in contigs.tsv, the record's number in it (from 0), the record's name and its length in
bases, the stretch (0-based, half-open), and the evaluation sets it was found in. Lines are sorted, stretches of one record
neither overlap nor touch, and equal findings give equal bytes.

A list names no sequence and no token, so it can be given to any dataset of the same genomes. But `audit` finds only what
stands in the sequences of the dataset it searched: not what `finalize` had removed from that as a duplicate, nor what
`--packing paper` truncated, nor short tails. Other datasets may have matches there that the list lacks: audit before
`finalize`, with the packing and the splits of the dataset that the list is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, log, write_atomically

HEADER = "file\trecord\tcontig\tlength\tstart\tend\tagainst"


@dataclass(frozen=True)
class Stretches:
    """Stretches of contigs. All arrays are [stretches]."""

    contig: NDArray[np.int64]  # number, as in contigs.tsv
    start: NDArray[np.int64]
    end: NDArray[np.int64]  # exclusive
    sets: NDArray[np.unsignedinteger[Any]]  # bit i: evaluation set i

    def __len__(self) -> int:
        return len(self.contig)


class _Record(NamedTuple):
    contig: int
    file: str
    number: int  # in the file
    name: str
    length: int


def merge(parts: Sequence[Stretches]) -> Stretches:
    """The union of one part or more, sorted by contig and start; what overlaps or touches becomes one, of all their sets."""
    fields = ("contig", "start", "end", "sets")
    contig, start, end, sets = (np.concatenate([getattr(part, field) for part in parts]) for field in fields)
    if not len(contig):
        return Stretches(contig, start, end, sets)
    order = np.lexsort((start, contig))
    contig, start, end, sets = contig[order], start[order], end[order], sets[order]
    # All contigs on one axis, with a gap between them, so that one running maximum tells how far the bases before reach.
    offset = np.cumsum(np.diff(contig, prepend=contig[0]) != 0) * (int(end.max()) + 1)
    reach = np.maximum.accumulate(end + offset)
    first = np.flatnonzero(np.concatenate([[True], (start + offset)[1:] > reach[:-1]]))
    last = np.append(first[1:], len(start)) - 1
    return Stretches(contig[first], start[first], (reach - offset)[last], np.bitwise_or.reduceat(sets, first))


def write_exclusions(path: Path, stretches: Stretches, contigs_path: Path, names: Sequence[str]) -> None:
    """Write merged `stretches` as a list. `names` are those of the evaluation sets, by bit.

    Whole or not at all, also where there is nothing to exclude: the list then has its header only.
    """
    lines = [HEADER]
    rows: dict[int, list[int]] = {}  # by contig
    for row, contig in enumerate(stretches.contig.tolist()):
        rows.setdefault(contig, []).append(row)
    against: dict[int, str] = {}
    # Files are numbered in the order of their names and records in theirs: contigs come sorted as the list is.
    for record in _records(contigs_path):
        for row in rows.get(record.contig, []):
            bits = int(stretches.sets[row])
            if bits not in against:
                against[bits] = ",".join(name for bit, name in enumerate(names) if bits >> bit & 1)
            place = f"{stretches.start[row]}\t{stretches.end[row]}"
            lines.append(f"{record.file}\t{record.number}\t{record.name}\t{record.length}\t{place}\t{against[bits]}")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


class Exclusions:
    """A list, as it applies to one dataset.

    Attributes:
        sha256: of the list's bytes.
        bases: bases of this dataset's genomes that the list excludes.
        files: how many of the list's files the dataset has; `unknown_files`: how many it doesn't have.
    """

    def __init__(self, sha256: str, stretches: Stretches, files: int, unknown_files: int) -> None:
        """`stretches` are merged, numbered as the dataset's contigs."""
        self.sha256, self.files, self.unknown_files = sha256, files, unknown_files
        self.bases = int((stretches.end - stretches.start).sum())
        self._contigs, row = np.unique(stretches.contig, return_inverse=True)
        # Excluded contigs on one axis, a base of gap after each: a search then needs no loop over contigs.
        self._gap = int(stretches.end.max(initial=0)) + 1
        self._starts, self._ends = stretches.start + row * self._gap, stretches.end + row * self._gap

    def hit(self, contig: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which sequences share at least one base with an excluded stretch. Arguments and result [sequences].

        `contig` is the number in contigs.tsv, `start` (0-based) and `end` (exclusive) are forward-strand bases of it,
        for sequences of either strand.
        """
        if not len(self._contigs):
            return np.zeros(len(contig), bool)
        row = np.minimum(np.searchsorted(self._contigs, contig), len(self._contigs) - 1)
        # An end past the contig's last excluded base must not reach into the next contig.
        low, high = start + row * self._gap, np.minimum(end, self._gap) + row * self._gap
        after = np.minimum(np.searchsorted(self._ends, low, side="right"), len(self._ends) - 1)  # ends behind the start
        overlaps: NDArray[np.bool_] = (self._ends[after] > low) & (self._starts[after] < high) & (end > start)
        return overlaps & (self._contigs[row] == contig)


def read_exclusions(path: Path, contigs_path: Path) -> Exclusions:
    """Read a list and place it in the dataset that has this contigs.tsv.

    Files that the dataset doesn't have are counted and logged. Raises InputError when it has none of them, or naming the
    line where the list is damaged, or where a record of a file that the dataset has goes by another name or length than in
    the list. Bases are not compared: a genome that changed, but for names and lengths, goes unnoticed.
    Memory: some 500 bytes a line of the list, whatever the size of contigs.tsv.
    """
    data = path.read_bytes()
    wanted = _parse(path, data)
    found, known = list[tuple[int, int, int]](), set[str]()
    for record in _records(contigs_path, wanted.keys()):
        known.add(record.file)
        for line, name, length, start, end in wanted[record.file].pop(record.number, ()):
            if (name, length) != (record.name, record.length):
                raise InputError(
                    f"{path}, line {line}: record {record.number} of {record.file} is {name!r} with {length} bases, but in "
                    f"{contigs_path} {record.name!r} with {record.length}; audit a dataset of these genomes again"
                )
            found.append((record.contig, start, end))
    for file in sorted(known):
        for number, rows in wanted[file].items():
            raise InputError(
                f"{path}, line {rows[0][0]}: {file} has no record {number} in {contigs_path}; audit a dataset of these "
                "genomes again"
            )
    unknown = wanted.keys() - known
    if unknown and not known:
        raise InputError(
            f"{path}: none of its {len(unknown)} files, such as {min(unknown)}, is in {contigs_path}; give a list "
            "that `audit` made of these genomes"
        )
    if unknown:
        log(f"{path}: {len(unknown)} of its {len(wanted)} files are not in this dataset, such as {min(unknown)}")
    contig, start, end = np.array(found, dtype=np.int64).reshape(-1, 3).T
    stretches = merge([Stretches(contig, start, end, np.zeros(len(contig), np.uint8))])
    return Exclusions(hashlib.sha256(data).hexdigest(), stretches, len(known), len(unknown))


_Row = tuple[int, str, int, int, int]  # line number, record name, record length, start, end


def _parse(path: Path, data: bytes) -> dict[str, dict[int, list[_Row]]]:
    """The list's rows by file and record number."""
    lines = data.decode("utf-8", "replace").split("\n")  # not splitlines: names may hold other ends of line
    if lines[0] != HEADER:
        raise InputError(
            f"{path}: not an exclusion list; its first line must be {' '.join(HEADER.split())}, with tabs between"
        )
    if lines[-1]:
        raise InputError(f"{path}, line {len(lines)}: has no end; the file was cut, write it again")
    wanted: dict[str, dict[int, list[_Row]]] = {}
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            file, record, name, length, start, end, _ = line.split("\t")
            row = (number, name, int(length), int(start), int(end))
            key = int(record)
        except ValueError:
            raise InputError(f"{path}, line {number}: not {' '.join(HEADER.split())} with tabs between") from None
        if not 0 <= row[3] < row[4] <= row[2]:
            raise InputError(f"{path}, line {number}: {start} to {end} is no stretch of a record of {length} bases")
        wanted.setdefault(file, {}).setdefault(key, []).append(row)
    return wanted


def _records(contigs_path: Path, files: Any = None) -> Iterator[_Record]:
    """The lines of contigs.tsv, of all files or of `files` only, one at a time: there may be millions."""
    file, record = "", -1
    with contigs_path.open(encoding="utf-8", newline="\n") as lines:
        next(lines)
        for line in lines:
            contig, _, its_file, rest = line.split("\t", 3)
            file, record = (its_file, 0) if its_file != file else (file, record + 1)
            if files is None or file in files:
                name, length = rest.rsplit("\t", 1)
                yield _Record(int(contig), file, record, name, int(length))
