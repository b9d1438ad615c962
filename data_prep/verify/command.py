"""`python -m data_prep verify`: every byte of a finished dataset is what was written, and what is not is named.

Small files first (tables.py), then the shards (shard.py), in processes of their own. What lies in several
shards is put together here: no base stands in two of them, least of all in one of train and one of valid, and a species'
sequences cover as many bases as the manifest says. With --genomes each sequence is also compared with its place in the
FASTA files (source.py).

One pass over the data; memory is a block a process, and the shards' stretches of the genome, 16 bytes each.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, add_verb, log, progress
from data_prep.dataset import SPLITS
from data_prep.processes import cores, run_in_processes
from data_prep.storage import file_sha256
from data_prep.verify.shard import Findings, Rules, check_shards
from data_prep.verify.source import check_sources
from data_prep.verify.tables import Tables, read_tables, unknown_files

LISTED = 100  # problems that are written out
SHARED_LISTED = 5  # of stretches of one species that stand in two shards


class Problems:
    """Writes problems to stderr as they are found, the first 100, and counts them all."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, path: Path, what: str) -> None:
        """A problem of one file."""
        self.line(f"{path}: {what}")

    def line(self, text: str) -> None:
        """A problem that names its file already."""
        self.count += 1
        if self.count <= LISTED:
            log(text)


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = add_verb(verbs, "verify", run, "Check every byte of a dataset and name what is wrong.")
    verb.add_argument("dataset", metavar="DATASET", help="directory of a finished dataset")
    verb.add_argument(
        "--genomes", type=Path, metavar="DIR", help="compare every sequence with its place in these genomes, too"
    )
    verb.add_argument("--processes", type=int, metavar="N", help="how many at a time (default: one a core)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb."""
    if "://" in args.dataset:
        raise InputError(f"{args.dataset}: verify reads every byte, so run it on a directory, where the files lie")
    processes = cores() if args.processes is None else args.processes
    if processes < 1:
        raise InputError(f"--processes {processes}: must be at least 1")
    return verify(Path(args.dataset), args.genomes, processes)


def verify(path: Path, genomes: Path | None = None, processes: int = 1) -> dict[str, Any]:
    """Check the dataset; with `genomes`, the folder it was made of, its sequences' places too.

    Returns:
        What was checked: `shards`, `bytes` (of their tars), `sequences`, `tokens`, `bases` (of the forward strand),
        `seconds`, `manifest_sha256`, and `sources` (as check_sources) or None.

    Raises InputError when anything is wrong, after all problems were written to stderr, a line each.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    started, problems = time.monotonic(), Problems()
    tables = read_tables(path, problems.add)
    for unknown in sorted(unknown_files(path, tables.shards)):
        problems.add(unknown, "not part of the dataset; remove it")
    size, bases = _check_shards(path, tables, processes, problems)
    seconds = time.monotonic() - started
    result: dict[str, Any] = {
        "manifest_sha256": file_sha256(path / "manifest.json"),
        "shards": sum(map(len, tables.shards.values())),
        "bytes": size,
        **{key: sum(int(table[key].sum()) for table in tables.shards.values()) for key in ("sequences", "tokens")},
        "bases": bases,
        "seconds": round(seconds, 3),
        "sources": None,
    }
    log(
        f"{path}: read {result['shards']} shards, {size / 1e6:,.1f} MB, {bases:,} bases, in {seconds:.1f} s "
        f"({size / 1e6 / seconds:.1f} MB/s)"
    )
    damaged = problems.count > 0
    if genomes is not None and damaged:
        log(f"{genomes}: not compared with a dataset that is damaged")
    elif genomes is not None:
        result["sources"] = check_sources(path, tables.manifest, genomes, processes, problems.line)
    if problems.count > LISTED:
        log(f"... and {problems.count - LISTED} more problems")
    if problems.count:
        many = f"{problems.count} problem{'s' if problems.count > 1 else ''}"
        remedy = "copy those files again" if damaged else "give --genomes the files that it was made of"
        raise InputError(f"{path}: {many}, named above; {remedy}, or shard again")
    log(f"{path}: whole, manifest sha256 {result['manifest_sha256']}")
    return result


def _check_shards(path: Path, tables: Tables, processes: int, problems: Problems) -> tuple[int, int]:
    """Check all shards; return the bytes read and the bases that their sequences cover on the forward strand."""
    calls, species = list(_calls(path, tables, processes)), len(tables.manifest["species"])
    counts = [np.bincount(table["species"], minlength=species) for table in tables.shards.values()]
    left: NDArray[np.int64] = sum(counts, np.zeros(species, np.int64))
    for empty in np.flatnonzero(left == 0).tolist():
        _check_species(path, tables, empty, [], problems)
    if processes == 1 or len(calls) < 2:
        batches: Iterator[list[Findings]] = (check_shards(*call) for call in calls)
    else:
        batches = run_in_processes(check_shards, calls, processes)
    size, bases, waiting = 0, 0, defaultdict[int, list[Findings]](list)
    for found in progress((found for batch in batches for found in batch), total=int(left.sum()), unit="shards"):
        for text in found.problems:
            problems.line(text)
        if found.unlisted:
            problems.add(path / found.split / f"{found.shard:06d}.tar", f"{found.unlisted} more problems")
        size, bases = size + found.bytes, bases + found.bases
        waiting[found.species].append(found)
        left[found.species] -= 1
        if not left[found.species]:
            _check_species(path, tables, found.species, waiting.pop(found.species), problems)
    return size, bases


def _calls(path: Path, tables: Tables, processes: int) -> Iterator[tuple[Path, str, NDArray[np.void], Rules]]:
    """Arguments of check_shards: the shards of a species after those of another, a few for each process."""
    some = 1 + sum(map(len, tables.shards.values())) // (16 * processes)
    for species in range(len(tables.manifest["species"])):
        rules = _rules(tables, species)
        for split, table in tables.shards.items():
            mine = table[table["species"] == species]
            for start in range(0, len(mine), some):
                yield path, split, mine[start : start + some], rules


def _rules(tables: Tables, species: int) -> Rules:
    manifest, codec, lengths = tables.manifest, tables.codec, tables.lengths
    first, contigs = tables.first_contig[species], manifest["species"][species]["contigs"]
    axis = None
    if lengths is not None:
        axis = np.concatenate([[0], np.cumsum(lengths[first : first + contigs] + 1)])
    return Rules(
        shortest=min(manifest["minimum_tokens"], manifest["sequence_length"] - 2),
        longest=manifest["sequence_length"] - 2,
        vocab_size=manifest["tokenizer"]["vocab_size"],
        strands=(1, -1) if manifest["strands"] == "both" else (1,),
        token_bases=codec.token_bases if codec is not None else None,
        overlap=codec.overlap if codec is not None else 0,
        first_contig=first,
        contigs=contigs,
        axis=axis,
    )


def _check_species(path: Path, tables: Tables, species: int, shards: list[Findings], problems: Problems) -> None:
    """Check what takes all shards of a species: the bases they cover, and that none stands in two of them."""
    if tables.lengths is None or any(found.runs is None for found in shards):
        return
    row, rules = tables.manifest["species"][species], _rules(tables, species)
    kept, covered = row["bases"]["kept"], sum(found.bases for found in shards)
    if len(tables.shards) == len(SPLITS) and kept != covered:
        what = f"species {row['name']}: {kept} bases kept, but its sequences cover {covered} of the forward strand"
        problems.add(path / "manifest.json", what)
    runs = [found.runs for found in shards if found.runs is not None]
    owner = np.repeat(np.arange(len(shards)), [len(each) for each in runs])
    first, end = np.concatenate(runs).T if runs else np.empty((2, 0), np.int64)
    order = np.argsort(first, kind="stable")
    first, end, owner = first[order], end[order], owner[order]
    reach = np.maximum.accumulate(end)
    shared_starts = np.flatnonzero(first[1:] < reach[:-1]) + 1
    for late in shared_starts[:SHARED_LISTED]:
        early = int(np.argmax(end[:late]))
        one, other = (shards[owner[number]] for number in (early, late))
        start, shared = int(first[late]), int(min(end[early], end[late]) - first[late])
        # A leak between the splits and a base that trains twice look alike; the paths tell which it is.
        problems.add(
            path / other.split / f"{other.shard:06d}.tar",
            f"{shared} bases from {rules.describe(start)} on stand in {one.split}/{one.shard:06d}.tar, too",
        )
    if len(shared_starts) > SHARED_LISTED:
        what = f"species {row['name']}: {len(shared_starts) - SHARED_LISTED} more stretches stand in two shards"
        problems.add(path / "manifest.json", what)
