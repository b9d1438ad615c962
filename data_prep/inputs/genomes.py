"""Finds the genomes below a folder and reads them as regions, the grain at which train and validation data differ.

    GENOMES/<category>/[any folders/]<species>.fa[.gz]
    GENOMES/<category>/[any folders/]<name>.csv[.gz]       a column `sequence`, each row a record (csv_input.py)

The first folder names the category, the file the species; a CSV file is named by its whole path, because the tasks of GUE
have a `train.csv` each. Files are taken in the order of their relative paths, so numbers that are given to species and
contigs depend on the folder's contents only.

Nothing that looks like a genome is left out in silence: what can't be read is an error, what must not be read (CSV files
for evaluation, an unfinished download, a file that is reached twice) is logged. Hidden files and folders do not count.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from data_prep.cli import InputError, log
from data_prep.inputs.csv_input import is_csv, read_csv
from data_prep.inputs.fasta import CHUNK_BYTES, Digest, Piece, Point, read_fasta
from data_prep.inputs.segments import read_segment

SUFFIXES = (".fa", ".fasta", ".fna", ".csv")
PARTIAL = ".partial"  # what `fetch` adds to the name of a download that is not complete
REGION_BASES = 1_000_000
_NAME = re.compile(r"(.*)(?:\.fa|\.fasta|\.fna|(\.csv))(?:\.gz|(\.(?:bz2|lz4|xz|zip|zst)))?", re.IGNORECASE | re.DOTALL)
# A word in the name of a CSV file or of a folder above it.
_EVALUATION = re.compile(
    r"(^|[^a-z])(dev|eval|evaluation|heldout|holdout|test|val|valid|validation)([^a-z]|$)", re.IGNORECASE
)
_TRAINING = re.compile(r"(^|[^a-z])(train|training)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Genome:
    """One FASTA or CSV file."""

    name: str  # of the species
    category: str
    file: str  # path below the root, with forward slashes
    path: Path
    size: int  # of the file as it lies on disk, in bytes


class _File(NamedTuple):
    path: str  # below the root
    stem: str  # the same without suffixes
    table: bool  # CSV


class Region(NamedTuple):
    """Up to `region_bases` consecutive bases of one record; every base of a file is in exactly one."""

    record: int  # number of the record in its file
    name: str
    number: int  # of the region in its record
    start: int  # 0-based
    bases: bytes  # only A, C, G, T and N


@dataclass(frozen=True)
class Scan:
    """What a pass over a file found."""

    sha256: str
    names: list[str]  # [records]
    lengths: list[int]  # [records] in bases, whatever their letters
    points: list[Point]  # where it can be read from, from its begin to its end; see segments.py


def find_genomes(root: Path) -> list[Genome]:
    """All FASTA and CSV files below `root`, sorted by relative path. Raises InputError."""
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; --genomes takes one with FASTA files in it")
    found: list[_File] = []
    partial: list[str] = []
    for file in _files(root):
        if not file.isprintable():
            raise InputError(f"{file!r} in {root}: control characters in a file name; rename it")
        if file.endswith(PARTIAL):
            partial.append(file)
            continue
        match = _NAME.fullmatch(file)
        assert match  # or _files would not have found it
        stem, table, packed = match.groups()
        if packed:
            raise InputError(f"{root / file}: can't read {packed}; unpack it, or compress it with gzip or bgzip")
        if not (root / file).is_file():
            raise InputError(f"{root / file}: no file (a link to nothing, or a pipe); mend or remove it")
        found.append(_File(file, stem, table is not None))
    if partial:
        # No error: a `fetch` of more genomes than are wanted here may be running.
        few = _few(sorted(partial))
        log(f"{root}: left out {len(partial)} unfinished downloads: {few}; `fetch`, run again, completes them")
    found = _without_evaluation(root, sorted(found))
    if not found:
        raise InputError(f"{root}: no FASTA file ({', '.join(SUFFIXES)}, each also with .gz) to read in it or its folders")
    shared = Counter(os.path.basename(file.stem) for file in found if not file.table)
    genomes: dict[str, Genome] = {}
    for file, stem, table in found:
        # Downloads often repeat one file name in a folder each; the path then tells the species apart.
        name = os.path.basename(stem)
        name = stem if table or shared[name] > 1 else name
        if name in genomes:
            raise InputError(f"{root}: {genomes[name].file} and {file} both hold species {name!r}; remove or rename one")
        category = file.split("/", 1)[0] if "/" in file else "unspecified"
        genomes[name] = Genome(name, category, file, root / file, (root / file).stat().st_size)
    return list(genomes.values())


def _files(root: Path) -> Iterator[str]:
    """Relative paths of what is named like a genome below `root`, in no order; links to files and folders are followed.

    What is reached twice counts once: where it lies, or else at the first of the links to it.
    """
    reached: dict[str, str] = {}  # relative path by real path
    here, links = [""], list[str]()
    while here or links:
        place = here.pop() if here else heappop(links)
        path = root / place
        first = reached.setdefault(os.path.realpath(path), place)
        if first != place:
            log(f"{path}: left out, as a link to what is read as {root / first}")
        elif not path.is_dir():
            yield place
        else:
            with os.scandir(path) as entries:
                for entry in entries:
                    linked = entry.is_symlink()
                    folder = os.path.isdir(entry) if linked else entry.is_dir()
                    if not entry.name.startswith(".") and (folder or _NAME.fullmatch(entry.name.removesuffix(PARTIAL))):
                        inner = f"{place}/{entry.name}" if place else entry.name
                        if linked:
                            heappush(links, inner)
                        else:
                            here.append(inner)


def _without_evaluation(root: Path, found: list[_File]) -> list[_File]:
    """Leave out CSV files that are, by their names, for evaluation, and those beside them that are not for training."""
    evaluation = {file.path for file in found if file.table and _is_evaluation(file.stem)}
    beside = {os.path.dirname(path) for path in evaluation}
    kept = [
        file
        for file in found
        if not file.table
        or (file.path not in evaluation and (os.path.dirname(file.path) not in beside or _is_training(file.stem)))
    ]
    if left_out := sorted({file.path for file in found}.difference(file.path for file in kept)):
        few = _few(left_out)
        log(f"{root}: left out {len(left_out)} CSV files, by their names for evaluation or not for training: {few}")
    return kept


def _few(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")


def _is_training(stem: str) -> bool:
    return bool(_TRAINING.search(os.path.basename(stem))) and not _EVALUATION.search(os.path.basename(stem))


def _is_evaluation(stem: str) -> bool:
    """Whether the file, or else a folder above it, is called so."""
    return bool(_EVALUATION.search(stem)) and not _is_training(stem)


def read_pieces(
    path: Path, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES, points: list[Point] | None = None
) -> Iterator[Piece]:
    """The pieces of a FASTA or CSV file, told apart by its suffix."""
    read = read_csv if is_csv(path) else read_fasta
    return read(path, digest=digest, chunk_bytes=chunk_bytes, points=points)


def scan(genome: Genome) -> Scan:
    """Checksum, names and lengths of a file's records, in one pass and constant memory."""
    digest, names, lengths, points = hashlib.sha256(), list[str](), list[int](), list[Point]()
    for piece in read_pieces(genome.path, digest=digest, points=points):
        if not piece.bases:
            names.append(piece.name)
            lengths.append(0)
        else:
            lengths[-1] += len(piece.bases)
    if genome.path.stat().st_size != genome.size:
        raise InputError(f"{genome.path}: has changed while it was read; is it still being downloaded?")
    return Scan(digest.hexdigest(), names, lengths, points)


def read_regions(
    path: Path,
    region_bases: int = REGION_BASES,
    *,
    digest: Digest | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    segment: Sequence[Point] | None = None,
    confirm: Callable[[Point], None] | None = None,
) -> Iterator[Region]:
    """Yield the regions of a file in order, each whole; memory is one region and one chunk.

    Of a segment (points of segments.py, which also says what `confirm` is for), those that begin in it; only the last one
    may not be whole.
    """
    if segment is None:
        pieces = read_pieces(path, digest=digest, chunk_bytes=chunk_bytes)
    else:
        pieces = read_segment(path, *segment, chunk_bytes=chunk_bytes, confirm=confirm)
    parts: list[bytes] = []
    record, name, start, size = -1, "", 0, 0  # of the region being filled
    for piece in pieces:
        if piece.record != record:
            if size:
                yield Region(record, name, start // region_bases, start, b"".join(parts))
            record, name, size, parts = piece.record, piece.name, 0, []
            start = -(-piece.start // region_bases) * region_bases  # a segment may begin within a region
        taken = max(start + size - piece.start, 0)
        while taken < len(piece.bases):
            part = piece.bases[taken : taken + region_bases - size]
            parts.append(part)
            taken, size = taken + len(part), size + len(part)
            if size == region_bases:
                yield Region(record, name, start // region_bases, start, b"".join(parts))
                start, size, parts = start + size, 0, []
    if size:
        yield Region(record, name, start // region_bases, start, b"".join(parts))
