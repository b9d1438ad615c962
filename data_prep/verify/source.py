"""Compares every sequence of a dataset with what stands at its place in the FASTA files it was made of.

A file is read once, as a stream, and its sequences come in the order of their first bases: a species' shards hold
consecutive stretches of its file (dataset.py), so only one unit's sequences have to be sorted at a time. Memory is one
unit's tokens and a few MB of text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, log, one_line, progress
from data_prep.codec import Codec
from data_prep.dataset import SPLITS, Dataset, Split, safe_join
from data_prep.inputs.genomes import read_regions
from data_prep.kmers import reverse_complement
from data_prep.processes import run_in_processes

LISTED = 3  # sequences of a file that are written out


class Compared(NamedTuple):
    """What was found in one file."""

    problems: list[str]  # one line each
    bases: int  # of the file
    sequences: int
    sequence_bases: int  # that they spell, on both strands


class _Sequence(NamedTuple):
    """A sequence and where it stands, in the dataset and in the genome."""

    split: str
    shard: int
    block: int
    number: int  # in its block
    contig: int
    start: int
    strand: int
    tokens: NDArray[np.uint16]


def check_sources(path: Path, manifest: dict[str, Any], genomes: Path, processes: int, problem: Any) -> dict[str, Any]:
    """Compare all files, in `processes`; `problem` is called with each line that names something wrong.

    Returns `files`, `bases` (of the files), `sequences`, `sequence_bases` and `seconds`.
    """
    if not genomes.is_dir():
        raise InputError(f"{genomes}: not a folder; --genomes takes the one that the dataset was made of")
    started = time.monotonic()
    # Large files first, so that all processes end at about the same time.
    order = sorted(range(len(manifest["species"])), key=lambda species: -manifest["species"][species]["bases"]["in"])
    calls = [(path, genomes, species) for species in order]
    if processes == 1 or len(calls) == 1:
        results: Iterator[Compared] = (compare(*call) for call in calls)
    else:
        results = run_in_processes(compare, calls, processes)
    bases = sequences = sequence_bases = 0
    for result in progress(results, total=len(calls), unit="files"):
        for text in result.problems:
            problem(text)
        bases, sequences = bases + result.bases, sequences + result.sequences
        sequence_bases += result.sequence_bases
    seconds = time.monotonic() - started
    log(
        f"{genomes}: {sequences:,} sequences of {sequence_bases:,} bases compared with {len(calls)} files "
        f"in {seconds:.1f} s ({sequence_bases / 1e6 / seconds:.1f} Mb/s)"
    )
    return {
        "files": len(calls),
        "bases": bases,
        "sequences": sequences,
        "sequence_bases": sequence_bases,
        "seconds": round(seconds, 3),
    }


def compare(path: Path, genomes: Path, species: int) -> Compared:
    """Compare the sequences of one species, of a dataset that is whole, with its file."""
    dataset = Dataset(path)
    row, codec = dataset.manifest["species"][species], Codec(dataset.tokenizer_path)
    file = safe_join(genomes, row["file"])
    text = BasesInOrder(file, row["first_contig"])
    problems, different, sequences, spelt = list[str](), 0, 0, 0
    try:
        for sequence in _in_order(dataset, species):
            bases = codec.decode(sequence.tokens)
            sequences, spelt = sequences + 1, spelt + len(bases)
            if sequence.strand < 0:
                bases = reverse_complement(bases)
            if text.at(sequence.contig, sequence.start, len(bases)) == bases:
                continue
            different += 1
            if different <= LISTED:
                problems.append(
                    f"{path / sequence.split / f'{sequence.shard:06d}.tar'}: block {sequence.block}, sequence "
                    f"{sequence.number} is not what stands in {file}, contig {sequence.contig} from base {sequence.start} on"
                )
        text.finish()
    except FileNotFoundError:
        return Compared([f"{file}: not found, but {row['name']} was made of it"], 0, 0, 0)
    except (InputError, OSError) as error:
        return Compared([*problems, one_line(error)], text.bases, sequences, spelt)
    if different > LISTED:
        problems.append(f"{file}: {different - LISTED} more sequences of {row['name']} are not what stands there")
    if text.digest.hexdigest() != row["file_sha256"]:
        same = "" if different else "; its sequences are still the same"
        problems.append(f"{file}: sha256 differs from that of the file the dataset was made of{same}")
    return Compared(problems, text.bases, sequences, spelt)


def _in_order(dataset: Dataset, species: int) -> Iterator[_Sequence]:
    """The sequences of a species, those of a unit in the order of their first bases."""
    splits = {name: dataset.split(name) for name in SPLITS}
    rows = {name: np.flatnonzero(split.shards["species"] == species) for name, split in splits.items()}
    of_shard: dict[int, list[tuple[Split, int]]] = {}
    for name, split in splits.items():
        for number in rows[name].tolist():
            of_shard.setdefault(int(split.shards["shard"][number]), []).append((split, number))
    for shard in sorted(of_shard):
        unit = [sequence for split, number in of_shard[shard] for sequence in _sequences(split, number, shard)]
        yield from sorted(unit, key=lambda sequence: (sequence.contig, sequence.start))


def _sequences(split: Split, row: int, shard: int) -> Iterator[_Sequence]:
    for number in range(len(split.blocks(row))):
        block = split.read_block(row, number)
        ends = np.cumsum(block.lengths, dtype=np.int64).tolist()
        begins = [0, *ends]
        for position, (contig, start, strand) in enumerate(block.source.tolist()):
            tokens = block.tokens[begins[position] : ends[position]]
            yield _Sequence(split.name, shard, number, position, contig, start, strand, tokens)


class BasesInOrder:
    """A file's bases, asked for in ascending order."""

    def __init__(self, file: Path, first_contig: int) -> None:
        self.digest, self.bases = hashlib.sha256(), 0
        self._regions, self._first_contig = read_regions(file, digest=self.digest), first_contig
        self._contig, self._start, self._window = -1, 0, b""  # the bases at hand

    def at(self, contig: int, start: int, size: int) -> bytes:
        """The `size` bases from `start` of contig number `contig` on; fewer or none past its end, none after going back."""
        while (self._contig, self._start + len(self._window)) < (contig, start + size):
            if not self._read():
                break
            if self._contig == contig:
                passed = min(max(0, start - self._start), len(self._window))
                self._start, self._window = self._start + passed, self._window[passed:]
        if self._contig != contig or start < self._start:
            return b""
        return self._window[start - self._start : start - self._start + size]

    def finish(self) -> None:
        """Read to the end of the file, for its checksum."""
        while self._read():
            self._window = b""

    def _read(self) -> bool:
        """Put the next region behind the bases at hand, or in their place when it is of another contig."""
        region = next(self._regions, None)
        if region is None:
            return False
        contig = self._first_contig + region.record
        if contig != self._contig:
            self._contig, self._start, self._window = contig, region.start, b""
        elif not self._window:
            self._start = region.start
        self._window += region.bases
        self.bases += len(region.bases)
        return True
