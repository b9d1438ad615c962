"""Loader speed beside what one would use otherwise, in one run: `python -m pretrain bench-loader`.

One process on one core, without worker processes and background threads. What is read lies in the page cache: the first pass
of each candidate isn't timed. What exactly is compared stands in `pretrain/bench_loader_candidates.py`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.cli import InputError, log
from pretrain.bench_loader_candidates import Batch, Start, build_candidates, write_copies, write_synthetic
from pretrain.config import load_config
from pretrain.loader import open_dataset

RESUMED = ("ours", "webdataset", "energon", "torchdata")
PACKAGES = ("torch", "numpy", "webdataset", "megatron-energon", "torchdata")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("config", nargs="?", default="tiny", metavar="CONFIG", help="a YAML file or preset (default: tiny)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="batch sizes are 512 and 128 unless they are given here"
    )
    parser.add_argument(
        "--dataset", type=Path, metavar="DIR", help="a dataset (default: a synthetic one, removed at the end)"
    )
    parser.add_argument(
        "--sequences", type=int, default=65_536, metavar="N", help="of the synthetic dataset, or copied for the others"
    )
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="length of a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="timed rounds of each candidate (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: measure and log a table."""
    result = bench(
        args.config, args.overrides, dataset=args.dataset, sequences=args.sequences, seconds=args.seconds, rounds=args.rounds
    )
    log(f"{'one core':18} {'tokens/s':>12}   seconds to resume")
    for name, speed in result["tokens_per_second"].items():
        resume = result["resume_seconds"].get(name)
        log(f"{name:18} {speed:12,.0f}" + ("" if resume is None else f"   {resume:.3f}"))
    log(
        f"ours / webdataset: {result['ratio_webdataset']:.2f} without masks on either side, "
        f"{result['ratio_webdataset_masked']:.2f} with ours; "
        f"ours without masks / our blocks through webdataset: {result['ratio_webdataset_blocks']:.2f}"
    )
    return result


def bench(
    config: str,
    overrides: Sequence[str] = (),
    *,
    dataset: Path | None = None,
    sequences: int = 65_536,
    seconds: float = 2.0,
    rounds: int = 5,
) -> dict[str, Any]:
    """Time `rounds` rounds of each candidate, alternating.

    Args:
        config, overrides: as for training. The batch sizes are 512 and 128 unless overridden; data.path is not used.
        dataset: a finished dataset, of which ours and `webdataset_blocks` read all; None: a synthetic one.
        sequences: of the synthetic dataset, or how many of `dataset` the others get.
        seconds: length of a round.

    Returns:
        `tokens_per_second` by candidate (medians, content tokens), the ratios, `resume_seconds` (median from nothing to the
        first batch in the middle of a pass), `resume_parts` (its opening and its first batch), `tokens_a_pass`, the setting,
        the versions and `not_installed` (packages whose candidates are left out); JSON.

    Raises InputError naming the flag, key or file.
    """
    for flag, value in (("sequences", sequences), ("seconds", seconds), ("rounds", rounds)):
        if not value > 0:
            raise InputError(f"--{flag} {value}: must be over 0")
    if any(override.startswith("data.path=") for override in overrides):
        raise InputError("data.path: not used here; name a dataset by --dataset DIR")
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        place = dataset if dataset is not None else write_synthetic(Path(scratch, "dataset"), sequences)
        sizes = ["train.global_batch_size=512", "train.micro_batch_size=128"]
        # JSON is YAML: a path stays a string, whatever is in it. One thread reads: everything happens on one core.
        settings = load_config(config, [*sizes, *overrides, f"data.path={json.dumps(str(place))}", "data.read_threads=1"])
        copies = write_copies(open_dataset(settings)[1], sequences, Path(scratch))
        candidates, missing = build_candidates(settings, copies)
        with _one_core():
            result = _measure(candidates, seconds, rounds)
        found = open_dataset(settings)[1]
    speed = result["tokens_per_second"]
    return {
        **result,
        "ratio_webdataset": speed["ours_plain"] / speed["webdataset"],
        "ratio_webdataset_masked": speed["ours"] / speed["webdataset"],
        "ratio_webdataset_blocks": speed["ours_plain"] / speed["webdataset_blocks"],
        "setting": {
            "dataset": "synthetic" if dataset is None else found.sha256,
            "dataset_sequences": found.manifest["splits"]["train"]["sequences"],
            "sequences": copies.sequences,
            "global_batch": settings.train.global_batch_size,
            "micro_batch": settings.train.micro_batch_size,
            "seconds": seconds,
            "rounds": rounds,
            "cores": 1,
            "cpu": platform.processor() or platform.machine(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES if name not in missing},
        },
        "not_installed": missing,
    }


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread on a single core, where the system can do that, and torch without threads of its own."""
    threads, can_pin = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if can_pin else set()
    torch.set_num_threads(1)
    try:
        if can_pin:
            os.sched_setaffinity(0, {max(cores)})
        yield
    finally:
        torch.set_num_threads(threads)
        if can_pin:
            os.sched_setaffinity(0, cores)


def _measure(candidates: dict[str, Start], seconds: float, rounds: int) -> dict[str, Any]:
    tokens_a_pass = {name: sum(batch.content for batch in start(False)) for name, start in candidates.items()}  # warms up
    # A candidate goes on where its last round ended: filling a shuffle buffer must not weigh on those with long passes.
    endless = {name: _endless(start) for name, start in candidates.items()}
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    opening: dict[str, list[float]] = {name: [] for name in candidates if name in RESUMED}
    first: dict[str, list[float]] = {name: [] for name in opening}
    for _ in range(rounds):
        for name, batches in endless.items():
            gc.collect()  # so that nobody pays for what another left
            speeds[name].append(_deliver(batches, seconds))
    for _ in range(rounds):
        for name in opening:
            gc.collect()
            began = time.perf_counter()
            resumed = candidates[name](True)
            opened = time.perf_counter()
            next(resumed)
            opening[name].append(opened - began)
            first[name].append(time.perf_counter() - opened)
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "tokens_a_pass": tokens_a_pass,
        "resume_seconds": {
            name: statistics.median(a + b for a, b in zip(opening[name], first[name], strict=True)) for name in opening
        },
        "resume_parts": {
            name: {"open": statistics.median(opening[name]), "first_batch": statistics.median(first[name])}
            for name in opening
        },
    }


def _endless(start: Start) -> Iterator[Batch]:
    """Pass after pass, each with a loader of its own."""
    while True:
        yield from start(False)


def _deliver(batches: Iterator[Batch], seconds: float) -> float:
    """Content tokens a second, over `seconds`."""
    tokens, began = 0, time.perf_counter()
    for batch in batches:
        tokens += batch.content
        if time.perf_counter() - began >= seconds:
            break
    return tokens / (time.perf_counter() - began)
