"""Builds the units of a dataset: streams a genome, splits its regions between train and valid, writes their shards.

A unit is done when its marker `.work/unit-<number>.json` exists. It is written, atomically, after the unit's shards and
the sketches of their sequences (duplicates/sketch.py) are durable under their final names, and the text that they were
made of was compared with that of the plan (inputs/segments.py); what dies before leaves files that nothing reads, and the
unit is built again, to the same bytes. Two tasks that build one unit at once do no harm for the same reason: each writes
under names of its own, until `finalize` begins.

A task gets a run of neighbouring units, because gzip other than bgzip can't be read from the middle (inputs/segments.py).
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cli import InputError, dump_json, fsync_directory, progress, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import SHARD_ROW, SPLITS, ShardWriter
from data_prep.duplicates.sketch import Sketcher
from data_prep.inputs.fasta import BEGIN, Point
from data_prep.inputs.genomes import read_regions
from data_prep.inputs.segments import segment_around
from data_prep.pack import Packed, Packer
from data_prep.plan import Plan, Unit, split_of, work
from data_prep.processes import run_in_processes

BEGUN = "begun.json"  # in the folder `final`: finalize has begun, so every unit was built


def build(
    dataset: Path, genomes: Path, plan: Plan, codec: Codec, units: Sequence[Unit], processes: int = 1
) -> list[dict[str, Any]]:
    """Build those of `units` that are not done, and return the markers of all of them, in order."""
    markers = {unit.number: read_marker(dataset, unit) for unit in units}
    missing = [unit for unit in units if markers[unit.number] is None]
    if processes == 1:
        built = _build_files(dataset, genomes, plan, codec, missing)
    else:
        calls = [(dataset, genomes, plan, codec.path, run) for run in runs_of(missing, processes)]
        built = (marker for run in run_in_processes(_build_run, calls, processes) for marker in run)
    for marker in progress(built, total=len(missing), unit="units"):
        markers[marker["unit"]] = marker
    return [marker for marker in markers.values() if marker is not None]


def runs_of(units: Sequence[Unit], processes: int) -> list[list[Unit]]:
    """Runs of neighbouring units of one file, a few for each process, so that all end at about the same time."""
    size = max(1, len(units) // (4 * processes))
    runs = list[list[Unit]]()
    for _, group in groupby(units, key=lambda unit: unit.species):
        of_file = list(group)
        runs += [of_file[start : start + size] for start in range(0, len(of_file), size)]
    return runs


def _build_run(dataset: Path, genomes: Path, plan: Plan, tokenizer: Path, units: Sequence[Unit]) -> list[dict[str, Any]]:
    return list(_build_files(dataset, genomes, plan, Codec(tokenizer), units))


def read_marker(dataset: Path, unit: Unit) -> dict[str, Any] | None:
    """The unit's marker, or None if the unit has to be built: no marker, or its shards are not of the size it tells."""
    settle(dataset, unit.number)
    try:
        marker: dict[str, Any] = json.loads(marker_path(dataset, unit.number).read_bytes())
        for split, row in shard_rows(marker).items():
            shard = dataset / split / f"{int(row['shard']):06d}.tar"
            if shard.stat().st_size != row["bytes"] or not shard.with_suffix(".index.npy").is_file():
                return None
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None
    return marker


def shard_rows(marker: dict[str, Any]) -> dict[str, np.void]:
    """The unit's row of each split's shards.npy; a split without a sequence of this unit has none."""
    rows = {split: np.frombuffer(bytes.fromhex(text), dtype=SHARD_ROW) for split, text in marker["rows"].items()}
    return {split: row[0] for split, row in rows.items()}


def marker_path(dataset: Path, unit: int) -> Path:
    """Where the marker of unit number `unit` is."""
    return work(dataset) / f"unit-{unit:06d}.json"


def final(dataset: Path) -> Path:
    """The folder of units from which sequences were removed (removal.py), until they take the place of the old ones."""
    return work(dataset) / "final"


def settle(dataset: Path, unit: int) -> None:
    """Complete the move of a unit's new shards, if its new marker lies in the folder `final`."""
    marker = final(dataset) / marker_path(dataset, unit).name
    if not marker.is_file():
        return
    kept = json.loads(marker.read_bytes())["rows"]
    for split in SPLITS:
        for file in (f"{unit:06d}.index.npy", f"{unit:06d}.tar"):
            if split not in kept:
                (dataset / split / file).unlink(missing_ok=True)
            elif (final(dataset) / split / file).is_file():
                os.replace(final(dataset) / split / file, dataset / split / file)
        fsync_directory(dataset / split)
    os.replace(marker, marker_path(dataset, unit))
    fsync_directory(work(dataset))


def marker_of(unit: int, species: int, bases: dict[str, Any], rows: Mapping[str, np.void | None]) -> dict[str, Any]:
    """What a marker says. `rows` has what each split's ShardWriter returned."""
    whole = {split: row for split, row in rows.items() if row is not None}
    return {
        "unit": unit,
        "species": species,
        "bases": bases,
        "sequences": {split: int(whole[split]["sequences"]) if split in whole else 0 for split in SPLITS},
        "tokens": {split: int(whole[split]["tokens"]) if split in whole else 0 for split in SPLITS},
        "rows": {split: row.tobytes().hex() for split, row in whole.items()},
    }


def _build_files(dataset: Path, genomes: Path, plan: Plan, codec: Codec, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
    """Build units, which are sorted, reading each of their files once; yield their markers."""
    for species, group in groupby(units, key=lambda unit: unit.species):
        row, mine = plan.species[species], list(group)
        confirmed: list[Point] = [BEGIN]
        regions = read_regions(
            genomes / row["file"],
            row["region_bases"],
            segment=segment_around(row["points"], mine[0].begin, mine[-1].end),
            confirm=confirmed.append,
        )
        waiting = deque[tuple[Unit, dict[str, Any]]]()  # for the text that they were made of to be confirmed
        for unit in mine:
            builder = _UnitBuilder(dataset, plan, codec, unit)
            try:
                position = unit.first_region
                for region in regions:
                    if (region.record, region.start) < unit.begin:  # before this run of units
                        continue
                    builder.add(split_of(row, position), row["first_contig"] + region.record, region.start, region.bases)
                    position += 1
                    if position == unit.first_region + unit.regions:
                        break
                if builder.packer.tally.total != unit.bases:
                    raise InputError(f"{genomes / row['file']}: has changed since it was scanned; choose another --out")
                if unit is mine[-1]:
                    for _ in regions:  # on to the next point
                        pass
                waiting.append((unit, builder.close()))
            except BaseException:
                builder.abort()
                raise
            while waiting and waiting[0][0].end <= (confirmed[-1].record, confirmed[-1].start):
                done, marker = waiting.popleft()
                write_atomically(marker_path(dataset, done.number), dump_json(marker))
                yield marker


class _UnitBuilder:
    """Packs one unit into a shard of each split."""

    def __init__(self, dataset: Path, plan: Plan, codec: Codec, unit: Unit) -> None:
        self.dataset, self.unit, options = dataset, unit, plan.parameters
        self.packer = Packer(codec, options["sequence_length"], options["packing"], options["strands"])
        self._writers: dict[str, ShardWriter] = {}
        self._sequences = dict.fromkeys(SPLITS, 0)  # written so far
        self._sketcher = None
        if options["duplicates_removed"] != "none":
            self._sketcher = Sketcher(options["seed"], near=options["duplicates_removed"] == "near")
        try:
            for split in SPLITS:
                self._writers[split] = ShardWriter(dataset / split, unit.number, unit.species)
        except BaseException:
            self.abort()
            raise

    def add(self, split: str, contig: int, start: int, bases: bytes) -> None:
        """Pack one region, which starts at base `start` of `contig`."""
        self.packer.add(lambda packed: self._write(split, packed), contig, start, bases)

    def _write(self, split: str, packed: Packed) -> None:
        if packed.strand > 0 and self._sketcher is not None:
            first = self._sequences[split]
            self._sketcher.add(SPLITS.index(split), first, packed.text, packed.starts, packed.bases)
        self._writers[split].extend(packed.tokens, packed.lengths, packed.source())
        self._sequences[split] += len(packed.lengths)

    def close(self) -> dict[str, Any]:
        """Make the shards durable, and return the unit's marker, which is to be written when the text is known to be right.

        A task that was long asleep may find its unit built, and sequences of it removed: then its own work is dropped.
        """
        self.packer.flush()
        rows = {split: writer.seal() for split, writer in self._writers.items()}
        if (self.dataset / "manifest.json").is_file() or (final(self.dataset) / BEGUN).is_file():
            raise InputError(
                f"{self.dataset}: `finalize` began before unit {self.unit.number} was built; run it again, and if it asks "
                f"for that unit, remove {self.dataset} and shard again"
            )
        for writer in self._writers.values():
            writer.publish()
        if self._sketcher is not None:
            self._sketcher.write(work(self.dataset), self.unit.number)
        return marker_of(self.unit.number, self.unit.species, self.packer.tally.as_json(), rows)

    def abort(self) -> None:
        """Leave nothing half-written behind."""
        for writer in self._writers.values():
            writer.abort()
