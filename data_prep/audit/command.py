"""Finds sequences of evaluation sets in the training data, and writes what `finalize` has to leave out.

A sequence of an evaluation set that shares an exact stretch of N bases (either strand) with the training data may have been
learned by heart. `audit` counts such sequences of each set, tells which species have them, and with `--exclusions` writes
the stretches of the genomes that they match (see exclusions.py, also for which datasets such a list holds): finalized
without those, this dataset has no match left. It reads datasets before `finalize` as well as after. The search itself is in
matches.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.audit.evaluations import PARTS, Evaluation, read_evaluations
from data_prep.audit.exclusions import Stretches, merge, write_exclusions
from data_prep.audit.matches import MAXIMUM_SETS, Number, ShardMatches, Windows, distinct, search_shard
from data_prep.cli import InputError, add_verb, log, progress, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import SPLITS, Dataset, Split
from data_prep.kmers import WORD_BASES
from data_prep.unfinished import Unfinished, open_dataset

MATCH_BASES = 50
SHORTEST_MATCH, LONGEST_MATCH = 16, 64  # chance finds shorter ones everywhere; a hash takes no longer ones
BOTH = "both"
SHOWN_SPECIES = 3  # in a row of the report
COUNTS = ("sequences", "too_short", "matched", "bases", "covered")


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    text = (
        "Count the sequences of evaluation sets that share long exact matches with the training data; list what to exclude."
    )
    verb = add_verb(verbs, "audit", run, text)
    verb.add_argument("dataset", type=Path, metavar="DATASET", help="a dataset, also before finalize")
    verb.add_argument(
        "--against", type=Path, required=True, metavar="GUE_DIR", help="folder below which evaluation sets lie, such as GUE"
    )
    text = f"shortest match in bases, from {SHORTEST_MATCH} to {LONGEST_MATCH} (default: {MATCH_BASES})"
    verb.add_argument("--match-bases", type=int, default=MATCH_BASES, metavar="N", help=text)
    text = "files of an evaluation set to look for (default: test)"
    verb.add_argument("--parts", nargs="+", choices=PARTS, default=["test"], help=text)
    text = (
        "split of the dataset to look in; both for a list that also holds where regions are split otherwise (default: train)"
    )
    verb.add_argument("--split-of-data", choices=(*SPLITS, BOTH), default="train", help=text)
    verb.add_argument("--exclusions", type=Path, metavar="FILE", help="write the matched stretches of the genomes here")
    verb.add_argument("--out", type=Path, metavar="REPORT.md", help="write the table here, as Markdown")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="processes that read shards (default: 1)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the audit that the command line asks for."""
    started = time.monotonic()
    if not SHORTEST_MATCH <= args.match_bases <= LONGEST_MATCH:
        raise InputError(f"--match-bases {args.match_bases}: must be from {SHORTEST_MATCH} to {LONGEST_MATCH}")
    if args.processes < 1:
        raise InputError(f"--processes {args.processes}: must be at least 1")
    dataset = open_dataset(args.dataset)
    parts = [part for part in PARTS if part in args.parts]
    evaluations = list(progress(read_evaluations(args.against, parts), total=None, unit="evaluation files"))
    names = list(dict.fromkeys(evaluation.name for evaluation in evaluations))
    if len(names) > MAXIMUM_SETS:
        raise InputError(f"{args.against}: {len(names)} evaluation sets; audit at most {MAXIMUM_SETS} at a time")
    windows = Windows(args.match_bases, [(names.index(evaluation.name), evaluation.texts) for evaluation in evaluations])
    log(f"{len(evaluations)} files of {len(names)} evaluation sets, {len(windows.hashes):,} distinct windows")
    codec = Codec(dataset.tokenizer_path)
    splits = [dataset.split(name) for name in SPLITS if args.split_of_data in (name, BOTH)]
    shards = chain.from_iterable(search(split, codec, windows, args.processes) for split in splits)
    species = [row["name"] for row in dataset.manifest["species"]]
    found = Findings(windows, species)
    searching = time.monotonic()
    for shard in progress(shards, total=sum(len(split.shards) for split in splits), unit="shards"):
        found.add(shard)
    searched = time.monotonic() - searching
    stretches = found.stretches()
    result: dict[str, Any] = {
        "match_bases": args.match_bases,
        "split": args.split_of_data,
        "units_missing": dataset.units_planned - dataset.units if isinstance(dataset, Unfinished) else 0,
        "training_sequences": found.sequences,
        "training_bases": found.bases,
        "evaluation_windows": len(windows.hashes),
        "sets": [found.count(evaluation) for evaluation in evaluations],
        "stretches": len(stretches),
        "stretch_bases": int((stretches.end - stretches.start).sum()),
    }
    result["total"] = {key: sum(row[key] for row in result["sets"]) for key in COUNTS}
    if result["units_missing"]:
        log(f"{args.dataset}: {result['units_missing']} units are not built yet, and are not in these counts")
    if args.exclusions is not None:
        if isinstance(dataset, Dataset) and (gone := _not_searched(dataset.manifest)):
            log(
                f"warning: {args.exclusions}: holds for the sequences of {args.dataset} only, which were made without "
                f"{gone}; for other datasets of these genomes audit one before `finalize`, with their packing"
            )
        write_exclusions(args.exclusions, stretches, dataset.contigs_path, names)
        log(f"{args.exclusions}: {result['stretches']:,} stretches, {result['stretch_bases']:,} bases")
    text = report(result)
    if args.out is not None:
        write_atomically(args.out, text.encode())
    seconds, speed = time.monotonic() - started, found.bases / searched
    log(f"{text}\n{found.bases:,} bases searched in {searched:.1f} s ({speed / 1e6:.1f} Mb/s), all in {seconds:.1f} s")
    return {**result, "seconds": round(seconds, 3), "bases_per_second": round(speed)}


def _not_searched(manifest: dict[str, Any]) -> str:
    """What of the genomes a finished dataset's sequences lack, although another dataset may have it; or nothing."""
    removed = manifest.get("duplicates", {})
    many = removed.get("exact", 0) + removed.get("near", 0)
    parts = [f"{many:,} duplicates"] if many and manifest.get("duplicates_removed") != "none" else []
    parts += ["what `--packing paper` truncated"] if manifest.get("packing") == "paper" else []
    return " and ".join(parts)


def search(split: Split, codec: Codec, windows: Windows, processes: int) -> Iterator[ShardMatches]:
    """Search every shard, in order. Further processes are forks, so that the windows are in memory once."""
    rows = range(len(split.shards))
    if processes == 1:
        yield from (search_shard(split, row, codec, windows) for row in rows)
        return
    with ProcessPoolExecutor(processes, get_context("fork"), _start, (split, codec, windows)) as pool:
        yield from pool.map(_search, rows)


_shared: tuple[Split, Codec, Windows]  # of a forked process


def _start(*shared: Any) -> None:
    global _shared
    _shared = shared


def _search(row: int) -> ShardMatches:
    split, codec, windows = _shared
    return search_shard(split, row, codec, windows)


class Findings:
    """What all shards have in common with the evaluation sets."""

    def __init__(self, windows: Windows, species: Sequence[str]) -> None:
        """`species` are the names of the manifest's species table."""
        self.windows, self.species = windows, species
        self.sequences = self.bases = 0
        self._found = np.zeros(len(windows.hashes), bool)  # in any species
        self._rows: dict[int, NDArray[np.int64]] = {}  # of the windows, by species
        none = np.empty(0, np.int64)
        self._stretches = [Stretches(none, none, none, windows.sets[:0])]

    def add(self, shard: ShardMatches) -> None:
        """Add what one shard has."""
        self.sequences, self.bases = self.sequences + shard.sequences, self.bases + shard.bases
        if len(shard.rows):
            self._found[shard.rows] = True
            before = self._rows.get(shard.species, shard.rows[:0])
            self._rows[shard.species] = distinct([before, shard.rows])
            self._stretches.append(shard.stretches)

    def stretches(self) -> Stretches:
        """All stretches of the genomes that match, merged."""
        return merge(self._stretches)

    def count(self, evaluation: Evaluation) -> dict[str, Any]:
        """The evaluation's row of the result."""
        texts, length = evaluation.texts, self.windows.length
        long_enough = np.diff(texts.ends, prepend=0) >= length
        positions, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        there = np.flatnonzero(self._found)
        known = self.windows.hashes[there]  # a small table, so that the look-ups stay in a cache
        for where, hashes in texts.windows(length):
            hit = _among(hashes, known)
            positions.append(where[hit])
            rows.append(there[np.searchsorted(known, hashes[hit])])
        position, row = np.concatenate(positions), np.concatenate(rows)
        sequence = evaluation.row[np.searchsorted(texts.ends, position, side="right")]
        counts = {self.species[each]: len(distinct([sequence[_among(row, mine)]])) for each, mine in self._rows.items()}
        ordered = sorted((-count, name) for name, count in counts.items() if count)
        return {
            "set": evaluation.name,
            "part": evaluation.part,
            "sequences": evaluation.sequences,
            "too_short": evaluation.sequences - len(distinct([evaluation.row[long_enough]])),
            "matched": len(distinct([sequence])),
            "bases": evaluation.bases,
            # A window covers its own bases up to where the next one begins.
            "covered": int(np.minimum(np.diff(position), length).sum()) + length if len(position) else 0,
            "from": {name: -count for count, name in ordered},
        }


def _among(values: NDArray[Number], some: NDArray[Number]) -> NDArray[np.bool_]:
    """Which of `values` are in `some`, which is sorted."""
    if not len(some):
        return np.zeros(len(values), bool)
    found: NDArray[np.bool_] = some[np.minimum(np.searchsorted(some, values), len(some) - 1)] == values
    return found


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    length, bases, windows = result["match_bases"], result["training_bases"], result["evaluation_windows"]
    chance = 0.0 if length <= WORD_BASES else bases * windows / 2**64
    lines = [
        f"# Exact matches of {length} bases or more between evaluation sets and training data",
        "",
        f"Searched: {result['training_sequences']:,} sequences (split: {result['split']}) with {bases:,} bases, for "
        f"{windows:,} distinct windows of {length} bases on either strand. Windows that seem to match by equal "
        f"hashes: {chance:.1g} expected.",
    ]
    if result["units_missing"]:
        lines.append(f"The dataset is not finished: {result['units_missing']} units were not there to be searched.")
    lines += [
        "",
        "| set | part | sequences | too short | with a match | share | bases | covered | share | most from |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    total = {"set": "total", "part": "", "from": {}, **result["total"]}
    for row in [*result["sets"], total]:
        species = [f"{name} {count:,}" for name, count in row["from"].items()]
        more = [f"{len(species) - SHOWN_SPECIES} more"] if len(species) > SHOWN_SPECIES else []
        cells = [
            *(row["set"], row["part"], f"{row['sequences']:,}", f"{row['too_short']:,}"),
            *(f"{row['matched']:,}", _share(row["matched"], row["sequences"])),
            *(f"{row['bases']:,}", f"{row['covered']:,}", _share(row["covered"], row["bases"])),
            ", ".join(species[:SHOWN_SPECIES] + more),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "A sequence is too short if it has no such window; it can't be found. Covered bases of a set lie in a match.",
        f"In the genomes the matches are {result['stretches']:,} stretches with {result['stretch_bases']:,} bases.",
    ]
    return "\n".join(lines) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"
