"""Builds the units of a dataset: streams a genome, splits its regions between train and valid, writes their shards.

A unit is done when its marker `.work/unit-<number>.json` exists. It is written, atomically, after the unit's shards
are durable under their final names; whatever dies before leaves partial files that nothing reads, and the unit is
built again, to the same bytes. Two tasks that build one unit at once do no harm for the same reason: each writes
under names of its own.

gzip can't seek, so a task reads a file from its start and skips what is not its own; it therefore gets a run of
neighbouring units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cli import InputError, dump_json, fsync_directory, progress, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import SHARD_ROW, SPLITS, ShardWriter
from data_prep.genomes import read_regions
from data_prep.pack import Packer
from data_prep.plan import Contigs, Plan, Unit, split_of, work


def build(dataset: Path, genomes: Path, plan: Plan, codec: Codec, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Build those of `units` that are not done, and return the markers of all of them, in order."""
    markers = {unit.number: read_marker(dataset, unit) for unit in units}
    missing = [unit for unit in units if markers[unit.number] is None]
    built = _build_files(dataset, genomes, plan, codec, missing)
    for marker in progress(built, total=len(missing), unit="units"):
        markers[marker["unit"]] = marker
    return [marker for marker in markers.values() if marker is not None]


def read_marker(dataset: Path, unit: Unit) -> dict[str, Any] | None:
    """The unit's marker, or None if the unit has to be built: no marker, or its shards are not of the size it tells."""
    path = _marker_path(dataset, unit)
    if not path.is_file():
        return None
    try:
        marker: dict[str, Any] = json.loads(path.read_bytes())
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


def _marker_path(dataset: Path, unit: Unit) -> Path:
    return work(dataset) / f"unit-{unit.number:06d}.json"


def _build_files(dataset: Path, genomes: Path, plan: Plan, codec: Codec, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
    """Build units, which are sorted, reading each of their files once; yield their markers."""
    for species, group in groupby(units, key=lambda unit: unit.species):
        row = plan.species[species]
        digest, contigs = hashlib.sha256(), Contigs(row["first_contig"])
        regions = enumerate(read_regions(genomes / row["file"], plan.parameters["region_bases"], digest=digest))
        for unit in group:
            last_region = unit.first_region + unit.regions - 1
            builder = _UnitBuilder(dataset, plan, codec, unit)
            try:
                for position, region in regions:
                    contig, copy = contigs.place(region.record, region.name)
                    if position >= unit.first_region:
                        split = split_of(plan.parameters, row["name"], region.name, copy, region.number)
                        builder.add(split, contig, region.start, region.bases)
                    if position == last_region:
                        break
                whole = builder.packer.tally.total == unit.bases
                if unit.number + 1 == len(plan.units) or plan.units[unit.number + 1].species != species:
                    whole = whole and next(regions, None) is None and digest.hexdigest() == row["file_sha256"]
                if not whole:
                    file = genomes / row["file"]
                    raise InputError(f"{file}: has changed since {dataset} was begun; choose another --out")
                marker = builder.close()
            except BaseException:
                builder.abort()
                raise
            yield marker


class _UnitBuilder:
    """Packs one unit into a shard of each split."""

    def __init__(self, dataset: Path, plan: Plan, codec: Codec, unit: Unit) -> None:
        self.dataset, self.unit = dataset, unit
        self.packer = Packer(codec, plan.parameters["sequence_length"])
        self._writers = {split: ShardWriter(dataset / split, unit.number, unit.species) for split in SPLITS}

    def add(self, split: str, contig: int, start: int, bases: bytes) -> None:
        """Pack one region, which starts at base `start` of `contig`."""
        self.packer.add(self._writers[split].add, contig, start, bases)

    def close(self) -> dict[str, Any]:
        """Make the shards durable, then the marker; return the marker."""
        self.packer.flush()
        rows = {split: writer.close() for split, writer in self._writers.items()}
        for split in SPLITS:
            fsync_directory(self.dataset / split)
        marker = {
            "unit": self.unit.number,
            "species": self.unit.species,
            "bases": self.packer.tally.as_json(),
            "sequences": {split: int(row["sequences"]) if row is not None else 0 for split, row in rows.items()},
            "tokens": {split: int(row["tokens"]) if row is not None else 0 for split, row in rows.items()},
            "rows": {split: row.tobytes().hex() for split, row in rows.items() if row is not None},
        }
        write_atomically(_marker_path(self.dataset, self.unit), dump_json(marker))
        return marker

    def abort(self) -> None:
        """Leave nothing half-written behind."""
        for writer in self._writers.values():
            writer.abort()
