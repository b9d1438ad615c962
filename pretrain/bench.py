"""`python -m pretrain bench`: the speed of a whole training step, of real tokens, beside Hugging Face's BERT in one run.

A step is what a run takes: the loader, forward and backward through DeepSpeed, the verdict on the gradient, the optimizer.
Steps of the candidates alternate on the same batches (of data.path, or of random tokens where that is no dataset), so that
all meet the same machine; a ratio is the median over the batches of the two steps' ratio. Under torchrun or srun the ranks
train together, ours alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.cli import InputError, log
from pretrain import bench_huggingface, bench_sweep, onednn
from pretrain.bench_loader_candidates import write_synthetic
from pretrain.bench_step import OurStep, count, flops, now
from pretrain.config import Config, load_config
from pretrain.distributed import World, start
from pretrain.engine import DTYPES
from pretrain.flops import mfu, peak_flops
from pretrain.loader import open_dataset

# Steps of each candidate before the timed ones: they compile what is compiled, and on a GPU, where every batch has another
# number of tokens, the allocator may need some until it holds blocks for all of them.
WARM_UP = {"cpu": 3, "cuda": 20}
SYNTHETIC = 8192  # sequences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("config", nargs="?", default="tiny", metavar="CONFIG", help="a YAML file or preset (default: tiny)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="such as train.micro_batch_size=32 data.path=DATASET"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        metavar="N",
        help="timed steps of each candidate (default: 10), after 3, or 20 on a GPU, that are not",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank (default: torch's choice)")
    parser.add_argument(
        "--against",
        nargs="*",
        default=["huggingface", "huggingface_masked_logits"],
        choices=bench_huggingface.NAMES,
        metavar="NAME",
        help=f"what to compare with: {', '.join(bench_huggingface.NAMES)} (default: the first two; none: ours alone)",
    )
    bench_sweep.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: measure and log a summary."""
    for name in ("steps", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.sweep:
        return bench_sweep.run(args)
    config = load_config(args.config, ["run_dir=none", *args.overrides])
    whole = any(text.startswith("train.global_batch_size=") for text in args.overrides)
    threads_before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        world = start()
        size = config.train.global_batch_size if whole else config.train.micro_batch_size * world.size
        train = config.train.model_copy(update={"global_batch_size": size, "batch_warmup": None})
        config = config.model_copy(update={"train": train})
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            if not (Path(config.data.path) / "manifest.json").is_file() and "://" not in config.data.path:
                synthetic = str(write_synthetic(Path(scratch) / "dataset", SYNTHETIC))
                config = config.model_copy(update={"data": config.data.model_copy(update={"path": synthetic})})
            result = _bench(config, world, args.steps, args.against if world.size == 1 else [])
    finally:
        torch.set_num_threads(threads_before)
    if world.is_first:
        _log(result)
    return result


def _bench(config: Config, world: World, steps: int, against: Sequence[str]) -> dict[str, Any]:
    device = world.device
    torch.manual_seed(0)
    config, dataset = open_dataset(config)
    longest = dataset.manifest["sequence_length"]
    ours = OurStep(config, dataset, world)
    masters = config.train.dtype != "fp32"
    theirs = {
        name: bench_huggingface.stepper(
            name, bench_huggingface.build(config.model, longest, device, DTYPES[config.train.dtype]), masters
        )
        for name in against
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *theirs)}
    counted: list[dict[str, int]] = []
    warm_up = WARM_UP[device.type]
    for number in range(warm_up + steps):
        if number == warm_up:
            seconds, counted = {name: [] for name in seconds}, []
            ours.batches.waited = 0.0
        started = now(device)
        batches = next(ours.batches)
        ours.step(batches)
        seconds["ours"].append(now(device) - started)
        counted.append(count(batches))
        padded = [bench_huggingface.pad(batch, device) for batch in batches] if theirs else []
        for name, step in theirs.items():
            started = now(device)
            step(padded)
            seconds[name].append(now(device) - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios: dict[str, Any] = {f"ratio_{name}": paired_ratio(seconds[name], seconds["ours"]) for name in theirs}
    mean = {key: sum(row[key] for row in counted) / len(counted) for key in counted[0]}
    return _result(config, world, ours, longest, steps, median, mean) | ratios | {"seconds": seconds}


def _result(
    config: Config,
    world: World,
    ours: OurStep,
    longest: int,
    steps: int,
    median: dict[str, float],
    mean: dict[str, float],
) -> dict[str, Any]:
    """Everything that is reported; a collective."""
    device = world.device
    alone = device.type == "cuda" and len(median) == 1
    memory_gb = torch.cuda.max_memory_allocated(device) / 1e9 if alone else None
    parts, (shares, largest) = ours.parts(max(2, steps // 2)), ours.profile(2)
    total = dict(zip(mean, world.sum(*mean.values()), strict=True))  # of all ranks
    median["ours"] = world.max(median["ours"])
    tokens, of_step = total["tokens"], {key: round(value) for key, value in total.items()}
    products = {"ours": flops(config, of_step)}
    for name in median.keys() - {"ours"}:
        products[name] = bench_huggingface.flops(config.model, of_step, "masked_logits" not in name)
    peak = peak_flops(device, config.train.dtype, config.train.peak_tflops)
    gemm = gemm_rate(config, device)
    result = {
        "tokens_per_second": {name: tokens / value for name, value in median.items()},
        "step_seconds": median,
        "parts_seconds": parts,
        "shares": shares,
        "largest_shares": largest,
        "matrix_flops_per_step": products,
        "mfu": None if peak is None else mfu(products["ours"], median["ours"], world.size, peak),
        "product_tflops": gemm / 1e12,
        "share_of_product_rate": products["ours"] / median["ours"] / world.size / gemm,
        "padding": 1 - tokens / (config.train.global_batch_size * longest),
        "memory_gb": memory_gb,  # None beside others
        "kernels": ours.kernels,
        "model": config.model.model_dump(),
        "setting": {
            "dtype": config.train.dtype,
            "zero_stage": config.deepspeed.zero_stage,
            "ranks": world.size,
            "ranks_a_node": int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", 0))) or None,
            "micro_batch": config.train.micro_batch_size,
            "global_batch": config.train.global_batch_size,
            "longest": longest,
            "steps": steps,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "transformers")}},
    }
    return result


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over batches of the seconds that they took for one, divided by ours."""
    return statistics.median(its / own for its, own in zip(theirs, ours, strict=True))


def gemm_rate(config: Config, device: torch.device) -> float:
    """FLOP/s of the model's largest product, forward, as the run computes it: what a step of nothing else could reach."""
    d, f = config.model.hidden_size, config.model.intermediate_size
    rows = 32768 if device.type == "cuda" else 4096
    a_td = torch.randn(rows, d, device=device, dtype=DTYPES[config.train.dtype])
    weight_fd = torch.randn(2 * f, d, device=device, dtype=DTYPES[config.train.dtype])
    seconds = []
    for _ in range(23):
        started = now(device)
        onednn.linear(a_td, weight_fd, None) if config.train.onednn else a_td @ weight_fd.t()
        seconds.append(now(device) - started)
    return 4 * rows * d * f / statistics.median(seconds[3:])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _log(result: dict[str, Any]) -> None:
    for name, speed in result["tokens_per_second"].items():
        products = result["matrix_flops_per_step"][name]
        rate = products / result["step_seconds"][name]
        ratio = "" if name == "ours" else f"   ours / it: {result[f'ratio_{name}']:.3f}, step by step"
        log(f"{name:36} {speed:12,.0f} tokens/s {rate / 1e9:10,.1f} GFLOP/s in products{ratio}")
    whole = sum(result["parts_seconds"].values())
    log("parts: " + ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in result["parts_seconds"].items()))
    log("time by kind: " + ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in result["shares"].items()))
    known = "" if result["mfu"] is None else f"MFU {result['mfu']:.1%}; "
    log(f"{known}{result['share_of_product_rate']:.1%} of the rate of the model's largest product by itself")
