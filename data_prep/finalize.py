"""Merges what the units left into the dataset's tables and commits the manifest, whose presence means "whole"."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.audit.exclusions import read_exclusions
from data_prep.cli import InputError, dump_json, fsync_directory, log, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import FORMAT_VERSION, SHARD_ROW, SPLITS, Dataset, npy_bytes
from data_prep.manifest import check_keys
from data_prep.pack import DROPPED
from data_prep.plan import Plan, load_plan, work
from data_prep.removal import begin, built_markers, remove
from data_prep.shard import read_marker, shard_rows
from data_prep.storage import file_sha256

WINDOW_BLOCKS = 4
MAXIMUM_STREAMS = 4096
SEQUENCES_PER_STREAM = 2048


def finalize(dataset: Path, exclude: Path | None = None) -> Dataset:
    """Remove duplicates and what the list `exclude` names, and commit the dataset.

    Running it again goes on, or opens the dataset if it is finished; InputError if that was done without this list.
    """
    if not (dataset / "manifest.json").is_file():
        with _alone(dataset):
            _commit(dataset, exclude)
    finished = Dataset(dataset)
    check_keys(f"{dataset}/manifest.json", finished.manifest)
    if exclude is not None and (finished.manifest["excluded"] or {}).get("sha256") != file_sha256(exclude):
        raise InputError(f"{dataset}: is finished, without --exclude {exclude}; shard again, with it, to another --out")
    # Left over by dead tasks or, after a crash between the manifest and here, by ourselves.
    for folder in (dataset, *(dataset / split for split in SPLITS)):
        for path in folder.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return finished


@contextmanager
def _alone(dataset: Path) -> Iterator[None]:
    """Keep a second `finalize` of the dataset out; raise InputError for it."""
    load_plan(dataset)  # or there is nothing to finalize
    with (work(dataset) / "finalize.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{dataset}: another `finalize` of it is running; wait for that") from None
        yield


def _commit(dataset: Path, exclude: Path | None) -> None:
    plan = load_plan(dataset)
    markers = built_markers(dataset, plan)
    for name, copy, sha256 in (
        ("contigs.tsv", "train/contigs.tsv", plan.contigs_sha256),
        ("tokenizer.json", "tokenizer.json", plan.parameters["tokenizer"]["sha256"]),
    ):
        if file_sha256(work(dataset) / name) != sha256:
            raise InputError(
                f"{work(dataset) / name}: was changed after the dataset was begun; remove {dataset} and shard again"
            )
        write_atomically(dataset / copy, (work(dataset) / name).read_bytes())
    exclusions = read_exclusions(exclude, work(dataset) / "contigs.tsv") if exclude is not None else None
    begin(dataset, exclusions.sha256 if exclusions is not None else None)
    codec = Codec(work(dataset) / "tokenizer.json")
    removed = remove(dataset, plan, codec, markers, exclusions)
    whole = removed.markers
    splits = {split: _merge(dataset, split, whole) for split in SPLITS}
    if splits["train"]["sequences"] == 0:
        raise InputError(
            f"{dataset}: no sequence to train on: the genomes have no stretch of A, C, G, T that is long enough, or "
            "all regions went to validation (--valid-fraction, --region-bases)"
        )
    if splits["valid"]["sequences"] == 0 and plan.parameters["valid_fraction"] > 0:
        log(f"{dataset}: no region fell to validation; a smaller --region-bases or a larger --valid-fraction gives some")
    files = ("tokenizer.json", "train/contigs.tsv", "train/shards.npy", "valid/shards.npy")
    sums = {file: file_sha256(dataset / file) for file in files}
    parameters = {key: value for key, value in plan.parameters.items() if key != "streams"}
    streams = streams_of(plan.parameters["streams"], splits["train"]["sequences"])
    manifest = {
        **parameters,
        "format_version": FORMAT_VERSION,
        "order": {"streams": streams, "window_blocks": WINDOW_BLOCKS},
        "splits": splits,
        "species": _species_table(plan, whole, splits["train"]["tokens"]),
        "duplicates": removed.duplicates,
        "excluded": {"sha256": exclusions.sha256, "sequences": removed.excluded} if exclusions is not None else None,
        "files": sums,
    }
    for unit, marker in zip(plan.units, whole, strict=True):
        if read_marker(dataset, unit) != marker:
            raise InputError(
                f"{dataset}: unit {unit.number} was changed meanwhile; is a task still running? Run finalize again"
            )
    write_atomically(dataset / "manifest.json", dump_json(manifest))
    fsync_directory(dataset)


def streams_of(chosen: int | None, sequences: int) -> int:
    """Streams of the training order: as chosen, or a power of two that leaves each at least 2,048 sequences."""
    if chosen is not None:
        if chosen > sequences:
            raise InputError(f"--streams {chosen}: more than the {sequences} training sequences")
        return chosen
    room = max(1, sequences // SEQUENCES_PER_STREAM)
    return min(MAXIMUM_STREAMS, 1 << (room.bit_length() - 1))


def _merge(dataset: Path, split: str, markers: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Write the split's shards.npy; return its row of the manifest's table of splits."""
    rows = [found[split] for found in map(shard_rows, markers) if split in found]
    table = np.array(rows, dtype=SHARD_ROW)
    write_atomically(dataset / split / "shards.npy", npy_bytes(table))
    sums = {key: int(table[key].sum(dtype=np.uint64)) for key in ("blocks", "sequences", "tokens")}
    return {"shards": len(table), **sums}


def _species_table(plan: Plan, markers: Sequence[dict[str, Any]], train_tokens: int) -> list[dict[str, Any]]:
    """A row a file: where its bases went and what it contributes."""
    of_species: list[list[dict[str, Any]]] = [[] for _ in plan.species]
    for marker in markers:
        of_species[marker["species"]].append(marker)
    table = []
    for number, row in enumerate(plan.species):
        mine = of_species[number]
        tokens = {split: sum(marker["tokens"][split] for marker in mine) for split in SPLITS}
        table.append(
            {
                **{key: value for key, value in row.items() if key not in ("bases", "valid", "points")},
                "bases": {
                    "in": sum(marker["bases"]["in"] for marker in mine),
                    "kept": sum(marker["bases"]["kept"] for marker in mine),
                    "dropped": {reason: sum(marker["bases"]["dropped"][reason] for marker in mine) for reason in DROPPED},
                },
                "sequences": {split: sum(marker["sequences"][split] for marker in mine) for split in SPLITS},
                "tokens": tokens,
                "weight": tokens["train"] / train_tokens,
            }
        )
    return table


def summary(dataset: Dataset) -> dict[str, Any]:
    """What `--json` tells about a finished dataset."""
    species, splits = dataset.manifest["species"], dataset.manifest["splits"]
    return {
        "bases_in": sum(row["bases"]["in"] for row in species),
        "bases_kept": sum(row["bases"]["kept"] for row in species),
        "duplicates": {kind: dataset.manifest["duplicates"][kind] for kind in ("exact", "near")},
        "excluded": (dataset.manifest["excluded"] or {"sequences": 0})["sequences"],
        "tokens": {split: splits[split]["tokens"] for split in SPLITS},
        "sequences": {split: splits[split]["sequences"] for split in SPLITS},
        "shards": {split: splits[split]["shards"] for split in SPLITS},
        "species": len(species),
        "streams": dataset.manifest["order"]["streams"],
        "manifest_sha256": dataset.sha256,
    }
