"""Takes sequences out of a dataset in the making: duplicates (duplicates/search.py) and what an exclusion list names.

What is excluded goes first, so nothing is a duplicate of it. Only the shards that lose sequences are written anew, aside
in `.work/final/`, and moved over the old ones when they are durable. The unit's new marker, which lies there too until its
shards are moved, is the journal: who finds it ends the move, so a kill at any instant leaves either the old unit or the new
one.

A reverse-complement sequence (`--strands both`) is not judged by itself, because its window is not that of a forward
sequence: it goes with the last forward sequence that begins at or before its middle base. That is the one around the middle,
or, where pieces are truncated, that of the same piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.audit.exclusions import Exclusions
from data_prep.cli import InputError, dump_json, log, progress, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import SPLITS, Block, ShardWriter, npy_bytes
from data_prep.duplicates.partitions import SEQUENCE
from data_prep.duplicates.search import Duplicates, find_duplicates, prepare
from data_prep.pack import DROPPED
from data_prep.plan import Plan, load_plan, work
from data_prep.shard import BEGUN, final, marker_of, marker_path, read_marker, settle, shard_rows
from data_prep.unfinished import split_of_rows

KEPT = 0
DUPLICATE, NEAR_DUPLICATE, EXCLUDED = (DROPPED.index(reason) for reason in ("duplicate", "near_duplicate", "excluded"))
OF_REASON = np.array([KEPT, DUPLICATE, NEAR_DUPLICATE], dtype=np.uint8)  # reasons of duplicates/search.py in ours


@dataclass(frozen=True)
class Removed:
    """What was taken out."""

    markers: list[dict[str, Any]]  # of all units, as they are now
    duplicates: dict[str, Any]  # as in the manifest: exact, near, from
    excluded: int  # sequences


def remove(
    dataset: Path, plan: Plan, codec: Codec, markers: Sequence[dict[str, Any]], exclusions: Exclusions | None
) -> Removed:
    """Find and take out what the plan and the exclusion list ask for. Units that were done before are not done again."""
    excluded = _excluded(dataset, plan, codec, markers, exclusions)
    kind, units = plan.parameters["duplicates_removed"], [unit.number for unit in plan.units]
    found = Duplicates.none()
    if kind != "none":
        found = find_duplicates(work(dataset), units, near=kind == "near", excluded=excluded)
    lost = (
        np.searchsorted(found.unit, np.arange(len(units) + 1)),
        np.searchsorted(excluded["unit"], np.arange(len(units) + 1)),
    )
    now = []
    for unit, marker in enumerate(progress(markers, total=len(markers), unit="units checked")):
        mine, listed = (slice(int(bounds[unit]), int(bounds[unit + 1])) for bounds in lost)
        if "removed" not in marker and (mine.start < mine.stop or listed.start < listed.stop):
            marker = _remove_from(dataset, plan, codec, marker, found, mine, excluded[listed])
        now.append(marker)
    count = sum(marker.get("removed", {}).get("excluded", 0) for marker in now)
    return Removed(now, _origins(plan, found), count)


def _excluded(
    dataset: Path, plan: Plan, codec: Codec, markers: Sequence[dict[str, Any]], exclusions: Exclusions | None
) -> NDArray[np.void]:
    """All sequences that overlap what is to be excluded, on either strand. [excluded] of SEQUENCE, sorted.

    Found once, before any shard is written anew, because that changes the numbers of sequences.
    """
    if exclusions is None:
        return np.empty(0, SEQUENCE)
    path = final(dataset) / "excluded.npy"
    if not path.is_file():
        parts = [np.empty(0, SEQUENCE)]
        for marker in progress(markers, total=len(markers), unit="units searched for what is excluded"):
            for split, row in sorted(shard_rows(marker).items()):
                contig, start, end, _ = _spans(dataset, split, row, codec).T
                numbers = np.flatnonzero(exclusions.hit(contig, start, end))
                parts.append(np.zeros(len(numbers), SEQUENCE))
                parts[-1]["unit"], parts[-1]["split"], parts[-1]["number"] = marker["unit"], SPLITS.index(split), numbers
        write_atomically(path, npy_bytes(np.concatenate(parts)))
    return np.load(path, allow_pickle=False)


def _remove_from(
    dataset: Path,
    plan: Plan,
    codec: Codec,
    marker: dict[str, Any],
    found: Duplicates,
    mine: slice,
    excluded: NDArray[np.void],
) -> dict[str, Any]:
    """Take the sequences of one unit out; return its new marker, or the old one if it loses nothing."""
    old = shard_rows(marker)
    reasons, losses = dict[str, NDArray[np.uint8]](), Counter[str]()  # [sequences of the shard]; bases on the forward strand
    for split, row in old.items():
        duplicate = np.zeros(int(row["sequences"]), dtype=np.uint8)
        in_split = found.split[mine] == SPLITS.index(split)
        duplicate[found.number[mine][in_split]] = OF_REASON[found.reason[mine][in_split]]
        listed = excluded["number"][excluded["split"] == SPLITS.index(split)]
        reasons[split], bases = _judge(_spans(dataset, split, row, codec), duplicate, listed)
        losses.update(bases)
    removed = {DROPPED[reason]: sum(int((each == reason).sum()) for each in reasons.values()) for reason in OF_REASON[1:]}
    removed["excluded"] = sum(int((each == EXCLUDED).sum()) for each in reasons.values())
    if not any(removed.values()):
        return marker
    dropped = {reason: count + losses[reason] for reason, count in marker["bases"]["dropped"].items()}
    kept = {"kept": marker["bases"]["kept"] - losses.total(), "dropped": dropped}
    rows = {split: _copy(dataset, split, row, reasons[split] == KEPT) for split, row in old.items()}
    new = {**marker_of(marker["unit"], marker["species"], {**marker["bases"], **kept}, rows), "removed": removed}
    write_atomically(final(dataset) / marker_path(dataset, marker["unit"]).name, dump_json(new))
    settle(dataset, marker["unit"])
    return new


def _blocks(dataset: Path, split: str, row: np.void) -> Iterator[Block]:
    shard = split_of_rows(dataset, split, [row])
    yield from (shard.read_block(0, number) for number in range(int(row["blocks"])))


def _spans(dataset: Path, split: str, row: np.void, codec: Codec) -> NDArray[np.int64]:
    """Contig, start, end and strand of each sequence of a shard [sequences, 4]."""
    spans = []
    for block in _blocks(dataset, split, row):
        contig, start, strand = block.source.T
        spans.append(np.stack([contig, start, start + codec.spans(block.tokens, block.lengths), strand], axis=1))
    return np.concatenate(spans)


def _judge(
    spans: NDArray[np.int64], reasons: NDArray[np.uint8], excluded: NDArray[np.uint32]
) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Complete `reasons` [sequences], which has the forward duplicates; `excluded` are numbers of sequences.

    Also returns the bases lost on the forward strand, by reason.
    """
    contig, start, end, strand = spans.T
    forward = strand > 0
    if not forward.all():
        first = contig.min()
        place, middle = (contig - first << 40) + start, (contig - first << 40) + (start + end) // 2
        holders = np.flatnonzero(forward)
        holders = holders[np.argsort(place[holders])]
        nearest = np.searchsorted(place[holders], middle, side="right") - 1
        holder = holders[np.maximum(nearest, 0)]
        inside = ~forward & (nearest >= 0) & (contig[holder] == contig)
        reasons[inside] = reasons[holder[inside]]
    reasons[excluded] = EXCLUDED
    bases = {
        DROPPED[reason]: int((end - start)[forward & (reasons == reason)].sum())
        for reason in (DUPLICATE, NEAR_DUPLICATE, EXCLUDED)
    }
    return reasons, bases


def _copy(dataset: Path, split: str, row: np.void, keep: NDArray[np.bool_]) -> np.void | None:
    """Write a shard with the sequences to keep, aside; its new row, or None if nothing is left."""
    if keep.all():
        return row
    writer = ShardWriter(final(dataset) / split, int(row["shard"]), int(row["species"]))
    try:
        number = 0
        for block in _blocks(dataset, split, row):
            kept, number = keep[number : number + len(block.lengths)], number + len(block.lengths)
            writer.extend(block.tokens[np.repeat(kept, block.lengths)], block.lengths[kept], block.source[kept])
        new = writer.close()
    except BaseException:
        writer.abort()
        raise
    return new


def _origins(plan: Plan, found: Duplicates) -> dict[str, Any]:
    """How many duplicates there are, and of what."""
    species_of_unit = np.array([unit.species for unit in plan.units], dtype=np.int64)
    pairs = np.stack([species_of_unit[found.unit], species_of_unit[found.kept_unit], found.reason.astype(np.int64)])
    origins: dict[tuple[int, int], dict[str, int]] = {}
    for (mine, kept, reason), count in zip(*_count(pairs), strict=True):
        origins.setdefault((mine, kept), {"exact": 0, "near": 0})["exact" if reason == 1 else "near"] = count
    table = [
        {"species": plan.species[mine]["name"], "kept_in": plan.species[kept]["name"], **counts}
        for (mine, kept), counts in sorted(origins.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    ]
    return {"exact": int((found.reason == 1).sum()), "near": int((found.reason == 2).sum()), "from": table}


def _count(columns: NDArray[np.int64]) -> tuple[list[list[int]], list[int]]:
    values, counts = np.unique(columns, axis=1, return_counts=True)
    return values.T.tolist(), counts.tolist()


def prepare_removal(dataset: Path, num_tasks: int, task: int) -> dict[str, Any]:
    """One task's share of the search for duplicates, which `remove` then finds done."""
    if (dataset / "manifest.json").is_file():
        log(f"{dataset}: is whole; nothing to do")
        return {"task": task, "num_tasks": num_tasks}
    plan = load_plan(dataset)
    built_markers(dataset, plan)
    if plan.parameters["duplicates_removed"] == "near":
        prepare(work(dataset), [unit.number for unit in plan.units], num_tasks, task)
    else:
        log(f"{dataset}: only near-duplicates take a search to share; nothing to do")
    return {"task": task, "num_tasks": num_tasks}


def built_markers(dataset: Path, plan: Plan) -> list[dict[str, Any]]:
    """The markers of all units. Raises InputError naming the units that are missing."""
    markers = [read_marker(dataset, unit) for unit in plan.units]
    missing = [str(number) for number, marker in enumerate(markers) if marker is None]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{dataset}: {len(missing)} of {len(plan.units)} units are missing ({shown}); run "
            f"`python -m data_prep shard --out {dataset} ...` as before: it builds what is missing"
        )
    return [marker for marker in markers if marker is not None]


def begin(dataset: Path, exclude_sha256: str | None) -> None:
    """Remember with which exclusion list removal began; raise InputError if it began with another one."""
    path, asked = final(dataset) / BEGUN, dump_json({"exclude_sha256": exclude_sha256})
    if path.is_file() and path.read_bytes() != asked:
        raise InputError(
            f"{dataset}: `finalize` was begun with another --exclude, or without; give the same, or shard to another --out"
        )
    if not path.is_file():
        write_atomically(path, asked)
