"""Compares `shard` with what it can't beat by much: the bare `tokenizers` library on text that lies clean in memory.

Both get the same bases and the same cores: P processes of one thread each, which take turns at both. Bare is
`encode_batch_fast` on runs of 8,192 bases, whose tokens are thrown away. Ours reads the FASTA files (once to plan, once to
build), cleans, cuts, tokenizes, packs, sketches for duplicates, writes tars with sums, and syncs them to disk; once more
without the sketches (`--duplicates none`). The first turn does not count; of the others the median does. Planning is
timed once, in one process, and counts with its share, because `shard` reads the files in as many processes. What
`finalize` takes, which has no bare counterpart, is told beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from tokenizers import Tokenizer

from data_prep.cli import InputError, add_verb, log
from data_prep.codec import RUN_BASES, Codec
from data_prep.finalize import finalize
from data_prep.inputs.genomes import Genome, find_genomes, read_regions
from data_prep.plan import UNIT_BASES, Options, Plan, Unit, open_plan, units_of_task
from data_prep.processes import cores
from data_prep.shard import build
from data_prep.synthesize import synthesize
from data_prep.tokenizing.train import train

CORPUS_BASES = 32_490_000_000  # of the paper's multi-species corpus
NODE_CORES = 32  # of the node that hours are told for
BATCH_RUNS = 128  # that bare gets at a time: as many bases as ours
VOCAB_SIZE, SAMPLE_BASES = 4096, 3_000_000  # of the default tokenizer


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = add_verb(verbs, "bench", run, "Compare the speed of `shard` with that of bare `tokenizers`.")
    verb.add_argument("--genomes", type=Path, metavar="DIR", help="folder of FASTA files (default: made-up genomes)")
    verb.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: a BPE of 4096 trained on them)"
    )
    verb.add_argument(
        "--processes",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of processes to compare at (default: 1 and one a core)",
    )
    verb.add_argument("--repeats", type=int, default=5, metavar="N", help="turns that count (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time both at each number of processes."""
    counts = sorted(set(args.processes or (1, cores())))
    if counts[0] < 1 or args.repeats < 1:
        raise InputError("--processes and --repeats: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="data_prep-bench-") as name:
        folder, genomes, tokenizer = Path(name), args.genomes, args.tokenizer
        if genomes is None:
            log(f"making up {counts[-1]} genomes of {UNIT_BASES:,} bases, a unit of work for each process")
            synthesize(folder / "made", bases=counts[-1] * UNIT_BASES, species=counts[-1])
            genomes = folder / "made" / "genomes"
        if tokenizer is None:
            tokenizer = folder / "tokenizer.json"
            train(genomes, tokenizer, vocab_size=VOCAB_SIZE, sample_bases=SAMPLE_BASES)
        found = find_genomes(genomes)
        runs = [_compare(folder, genomes, found, tokenizer, count, args.repeats) for count in counts]
    core_rate = runs[-1]["shard_bases_per_second"] / counts[-1]
    hours = {str(nodes): CORPUS_BASES / (core_rate * NODE_CORES * nodes) / 3600 for nodes in (1, 100)}
    log(
        f"at {core_rate / 1e6:.2f} Mb/s a core, {CORPUS_BASES / 1e9:.1f} Gb take {hours['1']:.2f} h on 1 node "
        f"of {NODE_CORES} cores and {60 * hours['100']:.1f} min on 100, if it scales linearly"
    )
    return {"ratio": runs[-1]["ratio"], "runs": runs, "hours_for_corpus": hours, "node_cores": NODE_CORES}


def _compare(
    folder: Path, genomes: Path, found: Sequence[Genome], tokenizer: Path, processes: int, repeats: int
) -> dict[str, Any]:
    """Both at one number of processes."""
    dataset = folder / f"dataset-{processes}"
    size = sum(genome.size for genome in found)
    started = time.monotonic()
    # As `shard` makes them, or smaller where all processes would not end at about the same time.
    options = Options(unit_bases=min(UNIT_BASES, max(2_000_000, size // processes)))
    plan = open_plan(dataset, found, Codec(tokenizer), options)
    plan_seconds = (time.monotonic() - started) / processes
    bases = sum(unit.bases for unit in plan.units)
    context = get_context("spawn")
    barrier = context.Barrier(processes + 1)
    workers = [
        context.Process(
            target=_work,
            args=(barrier, repeats + 1, dataset, genomes, plan, tokenizer, units_of_task(plan.units, processes, task)),
            daemon=True,
        )
        for task in range(processes)
    ]
    for worker in workers:
        worker.start()
    times: dict[str, list[float]] = {"bare": [], "unsketched": [], "build": []}
    try:
        for turn in range(repeats + 1):
            for what in times:
                barrier.wait()
                started = time.monotonic()
                barrier.wait()
                times[what].append(time.monotonic() - started)
            log(
                f"{processes} processes, {f'turn {turn}' if turn else 'not counted'}: "
                + ", ".join(f"{what} {times[what][-1]:.2f} s" for what in times)
            )
            barrier.wait()
    except BrokenBarrierError:
        raise RuntimeError("a process failed; its error stands above") from None
    for worker in workers:
        worker.join()
    started = time.monotonic()
    finalize(dataset)
    finalize_seconds = time.monotonic() - started
    bare = bases / statistics.median(times["bare"][1:])
    shard, unsketched = (bases / (statistics.median(times[what][1:]) + plan_seconds) for what in ("build", "unsketched"))
    log(
        f"{processes} processes, {bases / 1e6:.1f} Mb: bare {bare / 1e6:.2f} Mb/s, ours {shard / 1e6:.2f} Mb/s, ratio "
        f"{shard / bare:.3f}; without duplicates {unsketched / 1e6:.2f} Mb/s, ratio {unsketched / bare:.3f}; "
        f"finalize {finalize_seconds:.2f} s"
    )
    return {
        "processes": processes,
        "bases": bases,
        "ratio": shard / bare,
        "ratio_without_duplicates": unsketched / bare,
        "bare_bases_per_second": bare,
        "shard_bases_per_second": shard,
        "unsketched_bases_per_second": unsketched,
        "plan_seconds": plan_seconds,
        "build_seconds": times["build"],
        "unsketched_seconds": times["unsketched"],
        "bare_seconds": times["bare"],
        "finalize_seconds": finalize_seconds,
    }


def _work(
    barrier: Any, turns: int, dataset: Path, genomes: Path, plan: Plan, tokenizer: Path, units: Sequence[Unit]
) -> None:
    """One process's share of both, turn by turn."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        runs, bare, codec = _runs_of(genomes, plan, units), Tokenizer.from_file(str(tokenizer)), Codec(tokenizer)
        unsketched = replace(plan, parameters={**plan.parameters, "duplicates_removed": "none"})
        aside = dataset / f".turn-{units[0].number if units else 'none'}"
        for turn in range(turns):
            barrier.wait()
            for start in range(0, len(runs), BATCH_RUNS):
                bare.encode_batch_fast(runs[start : start + BATCH_RUNS], add_special_tokens=False)
            barrier.wait()
            for mine, each in ((aside, unsketched), (dataset if turn + 1 == turns else aside, plan)):
                barrier.wait()
                build(mine, genomes, each, codec, units)
                barrier.wait()
                shutil.rmtree(aside, ignore_errors=True)  # the last turn's shards are what is finalized
            barrier.wait()
    except BaseException:
        barrier.abort()
        raise


def _runs_of(genomes: Path, plan: Plan, units: Sequence[Unit]) -> list[str]:
    """The clean text of units, cut at other letters and into runs."""
    runs = list[str]()
    for unit in units:
        row = plan.species[unit.species]
        for position, region in enumerate(read_regions(genomes / row["file"], row["region_bases"])):
            if unit.first_region <= position < unit.first_region + unit.regions:
                for piece in region.bases.decode("ascii").replace("N", " ").split():
                    runs += [piece[start : start + RUN_BASES] for start in range(0, len(piece), RUN_BASES)]
    return runs
