"""Finds the genomes below a folder and reads them as regions, the grain at which train and validation data differ.

    GENOMES/<category>/[any folders/]<species>.fa[.gz]

The first folder names the category, the file the species. Files are taken in the order of their relative paths, so
numbers that are given to species and contigs depend on the folder's contents only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.cli import InputError
from data_prep.fasta import CHUNK_BYTES, Digest, read_fasta

SUFFIXES = (".fa", ".fasta", ".fna")
REGION_BASES = 1_000_000


@dataclass(frozen=True)
class Genome:
    """One FASTA file."""

    name: str  # of the species
    category: str
    file: str  # path below the root, with forward slashes
    path: Path
    size: int  # of the file as it lies on disk, in bytes


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


def find_genomes(root: Path) -> list[Genome]:
    """All FASTA files below `root`, sorted by relative path."""
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; --genomes takes one with FASTA files in it")
    found: list[tuple[str, Path, str]] = []  # relative path, path, relative path without suffixes
    for path in root.rglob("*"):
        file = path.relative_to(root).as_posix()
        bare = file[:-3] if file.lower().endswith(".gz") else file
        stem, dot, suffix = bare.rpartition(".")
        if f"{dot}{suffix}".lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            if not file.isprintable():
                raise InputError(f"{file!r} in {root}: control characters in a file name; rename it")
            found.append((file, path, stem))
    if not found:
        raise InputError(f"{root}: no FASTA file ({', '.join(SUFFIXES)}, each also with .gz) in it or in its folders")
    shared = Counter(Path(stem).name for _, _, stem in found)
    genomes: dict[str, Genome] = {}
    for file, path, stem in sorted(found):
        # Downloads often repeat one file name in a folder each; the path then tells the species apart.
        name = Path(stem).name if shared[Path(stem).name] == 1 else stem
        if name in genomes:
            raise InputError(f"{root}: {genomes[name].file} and {file} both hold species {name!r}; remove or rename one")
        category = file.split("/", 1)[0] if "/" in file else "unspecified"
        genomes[name] = Genome(name, category, file, path, path.stat().st_size)
    return list(genomes.values())


def scan(genome: Genome) -> Scan:
    """Checksum, names and lengths of a file's records, in one pass and constant memory."""
    digest, names, lengths = hashlib.sha256(), list[str](), list[int]()
    for piece in read_fasta(genome.path, digest=digest):
        if not piece.bases:
            names.append(piece.name)
            lengths.append(0)
        else:
            lengths[-1] += len(piece.bases)
    return Scan(digest.hexdigest(), names, lengths)


def read_regions(
    path: Path, region_bases: int = REGION_BASES, *, digest: Digest | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Region]:
    """Yield the regions of a file in order, each whole; memory is one region and one chunk."""
    parts: list[bytes] = []
    record, name, start, size = -1, "", 0, 0  # of the region being filled
    for piece in read_fasta(path, digest=digest, chunk_bytes=chunk_bytes):
        if piece.record != record:
            if size:
                yield Region(record, name, start // region_bases, start, b"".join(parts))
            record, name, start, size, parts = piece.record, piece.name, 0, 0, []
        taken = 0
        while taken < len(piece.bases):
            part = piece.bases[taken : taken + region_bases - size]
            parts.append(part)
            taken, size = taken + len(part), size + len(part)
            if size == region_bases:
                yield Region(record, name, start // region_bases, start, b"".join(parts))
                start, size, parts = start + size, 0, []
    if size:
        yield Region(record, name, start // region_bases, start, b"".join(parts))
