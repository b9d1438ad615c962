"""The plan of a dataset: its parameters, its contigs, and its units of work, fixed before the first token is made.

Every task of an array that finds no plan makes one, and the first to finish stores it: the folder .work appears as a
whole, once, and a task with other options or genomes stops. So what a unit holds never depends on the number of tasks.
Until `finalize` commits the manifest, a dataset's folder holds its working state:

    .work/plan.json            the plan
    .work/contigs.tsv          becomes train/contigs.tsv
    .work/tokenizer.json       becomes tokenizer.json
    .work/unit-000012.json     the unit's shards are whole (see shard.py)

A unit is a run of consecutive regions of one file with at least `unit_bases` bases (the last of a file has what is
left).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cli import InputError, dump_json, fsync_directory, log, progress, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import FORMAT_VERSION, SPLITS
from data_prep.inputs.fasta import Point
from data_prep.inputs.genomes import REGION_BASES, Genome, Scan, scan
from data_prep.pack import MINIMUM_TOKENS, PACKINGS, STRANDS
from data_prep.processes import run_in_processes

UNIT_BASES = 16_000_000
SEQUENCE_LENGTH = 128
VALID_FRACTION = 0.02
DUPLICATES = ("near", "exact", "none")  # what `finalize` removes: near ones and exact ones, exact ones only, nothing
REGION_BASES_A_TOKEN = 100  # of a sequence: smallest region, so that few sequences are cut short by its edges
CONTIGS_HEADER = "contig\tspecies\tfile\tname\tlength\n"


@dataclass(frozen=True)
class Options:
    """What a user chooses, apart from genomes and tokenizer."""

    sequence_length: int = SEQUENCE_LENGTH
    unit_bases: int = UNIT_BASES
    region_bases: int = REGION_BASES
    valid_fraction: float = VALID_FRACTION
    seed: int = 0
    streams: int | None = None  # of the training order; None: finalize derives it from the number of sequences
    packing: str = PACKINGS[0]
    strands: str = STRANDS[0]
    duplicates_removed: str = DUPLICATES[0]
    region_tokens: int | None = None  # cut small genomes into the regions of sequences of this length; None: of our own

    def check(self) -> None:
        """Raise InputError naming the option that can't be."""
        longest, shortest = (1 << 16) - 1, MINIMUM_TOKENS + 2
        if not shortest <= self.sequence_length <= longest:
            raise InputError(f"--sequence-length {self.sequence_length}: must be from {shortest} to {longest} tokens")
        if not 0 <= self.valid_fraction < 1:
            raise InputError(f"--valid-fraction {self.valid_fraction}: must be at least 0 and below 1")
        for key in ("unit_bases", "region_bases", "streams", "region_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(f"--{key.replace('_', '-')} {value}: must be at least 1")


@dataclass(frozen=True)
class Unit:
    """Regions `first_region` to `first_region + regions - 1` of a file, numbered through all its records."""

    number: int
    species: int  # row of the species table
    first_region: int
    regions: int
    bases: int
    begin: tuple[int, int]  # number of a record, and of the base in it with which the unit begins
    end: tuple[int, int]  # that of the base behind the last one


@dataclass(frozen=True)
class Plan:
    """What `.work/plan.json` holds."""

    parameters: dict[str, Any]  # everything but the genomes that the dataset's bytes depend on
    # A row a file: name, category, file, file_bytes, file_sha256, contigs, first_contig, bases, region_bases, and `valid`,
    # the validation regions by their number in the file, ascending; `points` (inputs/fasta.py), to read the file from.
    species: list[dict[str, Any]]
    units: list[Unit]
    contigs_sha256: str

    def as_json(self) -> bytes:
        """The plan as it is stored."""
        return dump_json(asdict(self))


def work(dataset: Path) -> Path:
    """The folder of a dataset's working state."""
    return dataset / ".work"


def parameters_of(options: Options, codec: Codec) -> dict[str, Any]:
    """What the manifest will say about how the dataset was made."""
    return {
        "format_version": FORMAT_VERSION,
        **asdict(options),
        "minimum_tokens": MINIMUM_TOKENS,
        "run_bases": codec.run_bases(options.sequence_length - 2),
        "tokenizer": {
            "sha256": codec.sha256,
            "vocab_size": codec.vocab_size,
            "kind": codec.kind,
            "k": codec.k,
        },
    }


def open_plan(dataset: Path, genomes: Sequence[Genome], codec: Codec, options: Options, processes: int = 1) -> Plan:
    """The dataset's plan: the stored one if it is of the same parameters and files, or a new one."""
    if (work(dataset) / "plan.json").is_file():
        plan = load_plan(dataset)
        check_same(dataset, plan.parameters, plan.species, genomes, codec, options)
        return plan
    others = [path for path in dataset.iterdir() if not path.name.startswith(".work")] if dataset.is_dir() else []
    if others or (dataset.exists() and not dataset.is_dir()):
        raise InputError(f"{dataset}: exists and is not a dataset; choose another --out or empty it")
    if len(genomes) > np.iinfo("<u2").max:
        raise InputError(f"--genomes has {len(genomes)} files; a dataset holds at most {np.iinfo('<u2').max}")
    log(f"reading {len(genomes)} files to plan the units")
    species, units, contigs = list[dict[str, Any]](), list[Unit](), [CONTIGS_HEADER]
    scans = scan_all(genomes, processes)
    for row, genome in enumerate(genomes):
        found = scans[row]
        region_bases = region_bases_of(sum(found.lengths), options)
        species.append(
            {
                "name": genome.name,
                "category": genome.category,
                "file": genome.file,
                "file_bytes": genome.size,
                "file_sha256": found.sha256,
                "contigs": len(found.names),
                "first_contig": len(contigs) - 1,
                "bases": sum(found.lengths),
                "region_bases": region_bases,
                "valid": valid_regions(genome.name, found.names, found.lengths, region_bases, options),
                "points": found.points,
            }
        )
        units += _units(row, found.lengths, region_bases, options.unit_bases, len(units))
        for name, length in zip(found.names, found.lengths, strict=True):
            contigs.append(f"{len(contigs) - 1}\t{genome.name}\t{genome.file}\t{name}\t{length}\n")
    table = "".join(contigs).encode()
    plan = Plan(parameters_of(options, codec), species, units, hashlib.sha256(table).hexdigest())
    files = {"contigs.tsv": table, "tokenizer.json": codec.data, "plan.json": plan.as_json()}
    if not _publish(dataset, files):  # another task was faster
        stored = load_plan(dataset)
        check_same(dataset, stored.parameters, stored.species, genomes, codec, options)
        if stored.as_json() != plan.as_json():
            raise InputError(f"{dataset}: another task planned it from other files of the same names; choose another --out")
    return plan


def _publish(dataset: Path, files: dict[str, bytes]) -> bool:
    """Make the folder .work with these files, all at once; False if it is there."""
    dataset.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=dataset, prefix=".work."))
    try:
        for name, data in files.items():
            write_atomically(partial / name, data)
        partial.chmod(0o755)
        os.rename(partial, work(dataset))  # fails where there is a folder that isn't empty
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    fsync_directory(dataset)
    return True


def scan_all(genomes: Sequence[Genome], processes: int) -> list[Scan]:
    """The scan of each of `genomes`, in their order."""
    if processes == 1:
        return [scan(genome) for genome in progress(genomes, total=len(genomes), unit="files")]
    scans = dict[int, Scan]()
    calls = [(number, genome) for number, genome in enumerate(genomes)]
    for number, found in progress(run_in_processes(_scan, calls, processes), total=len(calls), unit="files"):
        scans[number] = found
    return [scans[number] for number in range(len(genomes))]


def _scan(number: int, genome: Genome) -> tuple[int, Scan]:
    return number, scan(genome)


def load_plan(dataset: Path) -> Plan:
    """The stored plan."""
    path = work(dataset) / "plan.json"
    if not path.is_file():
        raise InputError(f"{dataset}: `python -m data_prep shard --out {dataset}` has not begun a dataset here")
    try:
        stored = json.loads(path.read_bytes())
        units = [Unit(**{**unit, "begin": tuple(unit["begin"]), "end": tuple(unit["end"])}) for unit in stored["units"]]
        for row in stored["species"]:
            row["points"] = [Point(*point) for point in row["points"]]
        return Plan(stored["parameters"], stored["species"], units, stored["contigs_sha256"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a plan of this version; remove {dataset} and shard again") from None


def check_same(
    dataset: Path,
    stored: dict[str, Any],
    species: Sequence[dict[str, Any]],
    genomes: Sequence[Genome],
    codec: Codec,
    options: Options,
) -> None:
    """Raise InputError naming what differs between a dataset already begun or finished and what is asked for.

    Files are compared by name and size only, which costs nothing; their checksums are compared when they are read.
    """
    asked, given = parameters_of(options, codec), asdict(options)
    if stored.get("tokenizer", {}).get("sha256") != codec.sha256:
        raise InputError(f"{dataset}: was made with another --tokenizer than {codec.path}; choose another --out")
    for key, value in asked.items():
        if stored.get(key) != value:
            option = {"duplicates_removed": "--duplicates"}.get(key, f"--{key.replace('_', '-')}" if key in given else key)
            raise InputError(f"{dataset}: was made with {option} {stored.get(key)}, not {value}; choose another --out")
    was = {row["file"]: row["file_bytes"] for row in species}
    now = {genome.file: genome.size for genome in genomes}
    for file in sorted(was.keys() | now.keys()):
        if was.get(file) != now.get(file):
            change = "is new" if file not in was else "is missing" if file not in now else "has another size"
            raise InputError(f"{dataset}: since it was begun, {file} of --genomes {change}; choose another --out")


def _units(species: int, lengths: Sequence[int], region_bases: int, unit_bases: int, first_number: int) -> list[Unit]:
    """Cut one file's regions into units. `lengths` [records] in bases."""
    units, region, first, bases, begin, end = list[Unit](), 0, 0, 0, (0, 0), (0, 0)
    for record, length in enumerate(lengths):
        for start in range(0, length, region_bases):
            if not bases:
                begin = (record, start)
            end = (record, min(start + region_bases, length))
            bases += end[1] - start
            region += 1
            if bases >= unit_bases:
                units.append(Unit(first_number + len(units), species, first, region - first, bases, begin, end))
                first, bases = region, 0
    if bases:
        units.append(Unit(first_number + len(units), species, first, region - first, bases, begin, end))
    return units


def units_of_task(units: Sequence[Unit], num_tasks: int, task: int) -> list[Unit]:
    """The run of neighbouring units of task `task`, of about 1 / `num_tasks` of the bases.

    A unit belongs to the task in whose share its middle falls, so every unit has one task and a task may have none.
    """
    bases = np.array([unit.bases for unit in units], dtype=np.int64)
    before = np.cumsum(bases) - bases
    total = int(bases.sum())
    return [
        unit
        for unit, start in zip(units, before.tolist(), strict=True)
        if (2 * start + unit.bases) * num_tasks // (2 * total) == task
    ]


def region_bases_of(bases: int, options: Options) -> int:
    """Bases of a species' regions: as chosen, but so small that the share for validation is at least one whole region.

    A region is not cut so small, though, that its edges would shorten many of its sequences; so the smallest genomes (below
    100 bases a token of a sequence / `valid_fraction`: 640 kb) have a validation region by chance only.

    With `region_tokens` that length is another's, so that datasets of several lengths have the same regions.
    """
    smallest = REGION_BASES_A_TOKEN * (options.region_tokens or options.sequence_length)
    return min(options.region_bases, max(smallest, int(bases * options.valid_fraction)))


def valid_regions(
    species: str, names: Sequence[str], lengths: Sequence[int], region_bases: int, options: Options
) -> list[int]:
    """Numbers, through all records of the file, of the regions that go to validation, ascending.

    Stratified: of each species about `valid_fraction` of the bases, and exactly that on average over seeds. The regions are
    taken in the order of a hash of what they are (species, contig, number in it), the last with the chance that is left for
    it. So adding a species moves no region of another.
    """
    drawn, region, copies = list[tuple[int, float, int, int]](), 0, Counter[str]()
    for name, length in zip(names, lengths, strict=True):
        if length:
            copies[name] += 1  # tells apart records of one name
        for number, start in enumerate(range(0, length, region_bases)):
            key = json.dumps([options.seed, species, name, copies[name] - 1, number]).encode()
            digest = hashlib.blake2b(key, digest_size=16).digest()
            order, chance = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") / 2**64
            drawn.append((order, chance, region, min(region_bases, length - start)))
            region += 1
    valid, before, target = list[int](), 0, options.valid_fraction * sum(lengths)
    for _, chance, number, bases in sorted(drawn):
        if before >= target:
            break
        if before + chance * bases < target:
            valid.append(number)
        before += bases
    return sorted(valid)


def split_of(row: dict[str, Any], region: int) -> str:
    """`train` or `valid`: the split of a file's region. `row` is the file's of the species table."""
    valid = row["valid"]
    place = bisect_left(valid, region)
    return SPLITS[place < len(valid) and valid[place] == region]
