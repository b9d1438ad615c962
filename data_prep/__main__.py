"""`python -m data_prep <verb>`: from genomes to the dataset directory that pre-training reads (see dataset.py)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import bench
from data_prep import plan as planning
from data_prep import synthesize as synthesis
from data_prep.audit import command as audit
from data_prep.cli import InputError, add_verb, log, main, stoppable, writing
from data_prep.codec import Codec
from data_prep.dataset import Dataset
from data_prep.finalize import finalize, streams_of, summary
from data_prep.inputs.genomes import REGION_BASES, find_genomes
from data_prep.ncbi import catalog, fetch
from data_prep.pack import PACKINGS, STRANDS
from data_prep.processes import cores
from data_prep.removal import prepare_removal
from data_prep.report import command as report
from data_prep.shard import build
from data_prep.tokenizing import train as tokenizer
from data_prep.verify import command as verify

BASES_A_PROCESS = 64_000_000  # at least: starting a process costs as long as some Mb


def run_synthesize(args: argparse.Namespace) -> dict[str, Any]:
    """Write made-up genomes and a made-up GUE task."""
    started = time.monotonic()
    result = synthesis.synthesize(args.out, bases=args.bases, species=args.species, seed=args.seed)
    log(f"{args.out}: {result['bases']:,} bases of {result['species']} species, and the task {result['task']}")
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def processes_for(size: int, asked: int | None) -> int:
    """Processes for `size` bases, or bytes of genomes: as asked for, or one a core where there is some work for each."""
    if asked is not None and asked < 1:
        raise InputError(f"--processes {asked}: must be at least 1")
    return asked or max(1, min(cores(), size // BASES_A_PROCESS))


def run_shard(args: argparse.Namespace) -> dict[str, Any]:
    """Build one task's units, or everything including the manifest."""
    with writing(args.out):
        return _shard(args)


def _shard(args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    check_task(args)
    options = planning.Options(
        args.sequence_length,
        args.unit_bases,
        args.region_bases,
        args.valid_fraction,
        args.seed,
        args.streams,
        args.packing,
        args.strands,
        args.duplicates,
        args.region_tokens,
    )
    options.check()
    if args.exclude is not None:
        args.exclude.read_bytes()  # it is needed at the end of a long way
    codec, genomes = Codec(args.tokenizer), find_genomes(args.genomes)
    if (args.out / "manifest.json").is_file():
        finished = Dataset(args.out)
        order, splits = finished.manifest["order"], finished.manifest["splits"]
        same = order["streams"] == streams_of(args.streams, splits["train"]["sequences"])
        stored = {**finished.manifest, "streams": args.streams if same else order["streams"]}
        planning.check_same(args.out, stored, stored["species"], genomes, codec, options)
        log(f"{args.out}: is already whole; nothing to do")
        return {**summary(finalize(args.out, args.exclude)), "seconds": round(time.monotonic() - started, 3)}
    scanning = processes_for(sum(genome.size for genome in genomes), args.processes)
    plan = planning.open_plan(args.out, genomes, codec, options, scanning)
    units = plan.units
    if args.num_tasks is not None:
        units = planning.units_of_task(units, args.num_tasks, args.task)
    bases = sum(unit.bases for unit in units)
    log(f"{args.out}: {len(units)} of {len(plan.units)} units, {bases:,} bases")
    markers = build(args.out, args.genomes, plan, codec, units, processes_for(bases, args.processes))
    if args.num_tasks is None:
        result = summary(finalize(args.out, args.exclude))
    else:
        result = {
            "bases_in": bases,
            "bases_kept": sum(marker["bases"]["kept"] for marker in markers),
            "tokens": {split: sum(marker["tokens"][split] for marker in markers) for split in ("train", "valid")},
            "sequences": {split: sum(marker["sequences"][split] for marker in markers) for split in ("train", "valid")},
        }
    seconds = time.monotonic() - started
    log(
        f"{args.out}: {bases:,} bases, {sum(result['tokens'].values()):,} tokens, "
        f"{sum(result['sequences'].values()):,} sequences in {seconds:.1f} s ({bases / seconds / 1e6:.2f} Mb/s)"
    )
    if args.num_tasks is None:
        log(f"{args.out}: {removed(result)}")
    else:
        log(f"when all {args.num_tasks} tasks are done: python -m data_prep finalize {args.out}")
    return {**result, "units": len(units), "seconds": round(seconds, 3), "bases_per_second": round(bases / seconds)}


def removed(result: dict[str, Any]) -> str:
    """What a summary says about sequences that were taken out."""
    exact, near = result["duplicates"]["exact"], result["duplicates"]["near"]
    return f"{exact:,} exact duplicates, {near:,} near-duplicates and {result['excluded']:,} excluded sequences were removed"


def check_task(args: argparse.Namespace) -> None:
    """Raise InputError unless --num-tasks, --task and --exclude fit each other."""
    if (args.num_tasks is None) != (args.task is None):
        raise InputError("--num-tasks and --task go together")
    if args.num_tasks is not None and not 0 <= args.task < args.num_tasks:
        raise InputError(f"--task {args.task}: must be from 0 to --num-tasks - 1 = {args.num_tasks - 1}")
    if args.exclude is not None and args.num_tasks is not None:
        raise InputError("--exclude: for `finalize` without --num-tasks and --task; a task removes nothing")


def run_finalize(args: argparse.Namespace) -> dict[str, Any]:
    """Merge what the tasks left, remove duplicates, commit the manifest; or do a task's part of the search for them."""
    check_task(args)
    with writing(args.dataset):
        if args.num_tasks is not None:
            return prepare_removal(args.dataset, args.num_tasks, args.task)
        result = summary(finalize(args.dataset, args.exclude))
    log(f"{args.dataset}: {sum(result['sequences'].values()):,} sequences; {removed(result)}")
    log(f"{args.dataset}: whole, manifest sha256 {result['manifest_sha256']}")
    return result


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = add_verb(verbs, "synthesize", run_synthesize, "Make up genomes and a GUE-format task with a planted signal.")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets genomes/ and gue/")
    _number(verb, "--bases", synthesis.BASES, "bases of all genomes together")
    _number(verb, "--species", synthesis.SPECIES, "number of genomes")
    _number(verb, "--seed", 0, "equal seeds give equal files")

    for module in (catalog, fetch, tokenizer):
        module.register(verbs)

    verb = add_verb(
        verbs,
        "shard",
        run_shard,
        "Tokenize and pack genomes into a dataset. Killed or stopped, the same command goes on at the unit it was at.",
    )
    _genomes(verb)
    verb.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.json")
    verb.add_argument("--out", type=Path, required=True, metavar="DATASET", help="the dataset directory to write")
    _number(verb, "--sequence-length", planning.SEQUENCE_LENGTH, "tokens of a sequence, with [CLS] and [SEP]")
    _number(verb, "--unit-bases", planning.UNIT_BASES, "bases of a unit of work, which has a shard of its own")
    _number(verb, "--region-bases", REGION_BASES, "bases of a region, which is all train or all validation")
    _number(
        verb,
        "--region-tokens",
        None,
        "--sequence-length of a dataset of the same genomes whose regions, and so validation, this one shall have "
        "(default: regions of small genomes are longer for longer sequences)",
    )
    verb.add_argument(
        "--valid-fraction",
        type=float,
        default=planning.VALID_FRACTION,
        metavar="F",
        help=f"share of each species' bases that goes to validation, in whole regions (default: {planning.VALID_FRACTION})",
    )
    _number(verb, "--seed", 0, "chooses the validation regions")
    _number(
        verb,
        "--streams",
        None,
        "streams of the training order (default: a power of two up to 4096, one per 2048 sequences)",
    )
    _choice(verb, "--packing", PACKINGS, "contiguous throws nothing away; paper: 1,000-base pieces, truncated")
    _choice(verb, "--strands", STRANDS, "both: also the reverse complement of everything")
    _choice(verb, "--duplicates", planning.DUPLICATES, "which sequences `finalize` removes, but for the first of their kind")
    _exclude(verb)
    _task(verb, "tasks of a job array among which the units are divided (default: all at once)")
    _number(verb, "--processes", None, "to build units in (default: one a core, with 64 Mb or more for each)")

    verb = add_verb(verbs, "finalize", run_finalize, "Make what all tasks of an array built a dataset.")
    verb.add_argument("dataset", type=Path, metavar="DATASET", help="the --out of the tasks")
    _exclude(verb)
    _task(verb, "with --task: only a share of the search for duplicates, for large arrays; then finalize without both")

    for module in (verify, report, audit, bench):
        module.register(verbs)
    return parser


def _genomes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--genomes",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of FASTA files, DIR/<category>/<species>.fa[.gz], or CSV files with a column `sequence`",
    )


def _exclude(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--exclude", type=Path, metavar="FILE", help="leave out what this list of `audit --exclusions` names")


def _task(verb: argparse.ArgumentParser, text: str) -> None:
    _number(verb, "--num-tasks", None, text)
    _number(verb, "--task", None, "number of this task, from 0")


def _choice(verb: argparse.ArgumentParser, flag: str, choices: Sequence[str], text: str) -> None:
    verb.add_argument(flag, choices=choices, default=choices[0], help=f"{text} (default: {choices[0]})")


def _number(verb: argparse.ArgumentParser, flag: str, default: int | None, text: str) -> None:
    text = text if default is None else f"{text} (default: {default})"
    verb.add_argument(flag, type=int, default=default, metavar="N", help=text)


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own without `argv`) and return the exit status."""
    with stoppable():
        return main(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
