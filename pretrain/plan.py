"""`python -m pretrain plan`: what a run will need, known before it starts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log
from kernels.choice import OPERATIONS
from pretrain.checkpoint import KINDS
from pretrain.config import Config, load_config
from pretrain.flops import PEAK_TFLOPS, memory_of_gpu, peak_of_gpu, training_flops
from pretrain.loader import open_dataset
from pretrain.model import parameter_count
from pretrain.plan_activations import Kept, terms
from pretrain.plan_fit import USABLE_SHARE, Memory, Need, Way
from pretrain.plan_report import gigabytes, report
from pretrain.plan_state import parameter_shapes
from pretrain.saver import MARGIN_BYTES
from pretrain.schedule import batch_size

PAPER_GPUS, PAPER_DAYS = 8, 14  # Zhou et al., "DNABERT-2", ICLR 2024; their GPUs are RTX 2080 Ti
PAPER_TFLOPS = 53.8  # of one: fp16 summed in fp32, reference card (vendor's architecture white paper)
UNKNOWN_LENGTH = 128  # tokens of a sequence where no dataset says it: the paper's
OLD_GPUS = ("V100", "T4")  # that have no Triton kernels (kernels.choice.OLDEST_GPU)


def steps_on_disk(config: Config) -> int:
    """The most checkpoints that a run has on its disk at once.

    `keep_last`, one for each multiple of `keep_every`, and the one being written: what it pushes out goes only when it is
    whole. Never more than the run saves.
    """
    settings, last = config.checkpoint, config.train.max_steps
    saves = -(-last // settings.save_every)
    for_good = last // settings.keep_every if settings.keep_every else 0
    return min(saves, settings.keep_last + for_good + 1)


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint, but for its small files: 12 a parameter, fp32 weight and two moments."""
    return 4 * len(KINDS) * parameter_count(config.model)


def disk_bytes(config: Config) -> int:
    """Bytes that a run needs in its run_dir from its first step to its last.

    `checkpoint_bytes` for each of `steps_on_disk`, and a margin for logs and metrics. Takes `model.vocab_size` from the
    configuration: resolve that by its dataset first (`pretrain.loader.open_dataset`).
    """
    return checkpoint_bytes(config) * steps_on_disk(config) + MARGIN_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset such as dnabert2_117m")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default: 8")
    parser.add_argument(
        "--gpu", default="H100 80GB HBM3", metavar="NAME", help="as torch names it (default: H100 80GB HBM3)"
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="10^9 bytes a GPU (default: known for common GPUs)"
    )
    parser.add_argument("--mfu", type=float, default=0.40, metavar="SHARE", help="an assumption (default: 0.40)")
    parser.add_argument("--tokens-per-second-per-gpu", type=float, metavar="N", help="measured; instead of --mfu")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help=f"tokens, where the dataset isn't here (default: {UNKNOWN_LENGTH})"
    )
    parser.add_argument("--check", action="store_true", help="take a step on this machine's GPU and compare its memory")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb. Raises InputError for what can't be planned or can't fit, after the report is logged."""
    for name in ("nodes", "gpus_per_node", "gpu_memory_gb", "mfu", "tokens_per_second_per_gpu", "sequence_length"):
        value = getattr(args, name)
        if value is not None and not value > 0:  # NaN neither
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.mfu > 1:
        raise InputError(f"--mfu {args.mfu}: is a share, at most 1")
    config, data = _with_dataset(load_config(args.config, args.overrides), args.sequence_length)
    memory_gb = args.gpu_memory_gb or memory_of_gpu(args.gpu)
    if memory_gb is None:
        known = ", ".join(PEAK_TFLOPS)
        raise InputError(f"--gpu {args.gpu}: its memory is not known; give --gpu-memory-gb, or one of {known}")
    if config.train.onednn:
        raise InputError("train.onednn=true: it computes on CPUs, and this is a plan for GPUs")
    kernels = _kernels(config, args.gpu)
    memory = Memory(config, kernels, data["length"], args.gpus_per_node, memory_gb * 1e9 * USABLE_SHARE)
    train = config.train
    way = Way(config.deepspeed.zero_stage, train.micro_batch_size, train.activation_checkpointing, args.nodes)
    plan: dict[str, Any] = {
        "gpus": {"nodes": args.nodes, "per_node": args.gpus_per_node, "name": args.gpu, "memory_gb": memory_gb},
        "parameters": _parameters(config),
        "data": data,
        "memory": _memory(memory, way),
        "run": _run(config, args, data),
        "checkpoint_bytes": checkpoint_bytes(config),
        "disk_bytes": disk_bytes(config),
        "warnings": _warnings(config, way, args.gpus_per_node),
        "checked_against_a_gpu": None,
    }
    if data["path"] is None and args.sequence_length is None:
        plan["warnings"].append(
            f"sequences of {UNKNOWN_LENGTH} tokens are assumed; --sequence-length says otherwise (500m and 2500m: 1024)"
        )
    if args.check:
        from pretrain.plan_check import check

        plan["checked_against_a_gpu"] = check(config, data["length"])
    for line in report(plan):
        log(line)
    if not plan["memory"]["fits"]:
        raise InputError(_refusal(args.gpu, memory, way))
    return plan


def _with_dataset(config: Config, length: int | None) -> tuple[Config, dict[str, Any]]:
    """The configuration resolved by its dataset where that is on this machine, and what is known of the dataset."""
    if not Path(config.data.path).is_dir():
        tokens = length or UNKNOWN_LENGTH
        return config, {"path": None, "length": tokens, "tokens_a_sequence": float(tokens), "sequences": None}
    config, dataset = open_dataset(config)
    if length is not None:
        raise InputError(f"--sequence-length {length}: the dataset {dataset.path} says it; leave the flag out")
    train = dataset.manifest["splits"]["train"]
    if not train["sequences"]:
        raise InputError(f"{dataset.path}: has no training sequences")
    return config, {
        "path": str(dataset.path),
        "length": dataset.manifest["sequence_length"],
        "tokens_a_sequence": train["tokens"] / train["sequences"] + 2,  # [CLS] and [SEP]
        "sequences": train["sequences"],
    }


def _kernels(config: Config, gpu: str) -> dict[str, str]:
    """Who will compute each operation, if everything is installed."""
    names = config.kernels.model_dump()
    for operation in OPERATIONS:
        if names[operation] == "auto":
            slow = operation == "attention" and config.train.dtype == "fp32"
            names[operation] = "torch" if slow or any(old in gpu for old in OLD_GPUS) else "triton"
    return names


def _parameters(config: Config) -> dict[str, int]:
    parts = {"embeddings": 0, "layers": 0, "head": 0}
    for name, shape in parameter_shapes(config.model).items():
        part = "layers" if ".layer." in name else "embeddings" if "embeddings" in name else "head"
        parts[part] += math.prod(shape)
    return {"total": sum(parts.values()), **parts}


def _memory(memory: Memory, way: Way) -> dict[str, Any]:
    need = memory.need(way)
    stages: dict[str, Any] = {}
    for stage in memory.stages():
        other = memory.need(Way(stage, way.micro_batch, way.checkpointing, way.nodes))
        state = other.state
        stages[str(stage)] = {
            "weights": state.weights + state.small_weights,
            "master_weights": state.master_weights,
            "moments": state.moments,
            "gradients": state.gradients,
            "buffers_at_most": state.bucket + state.summing + state.gathered,
            "peak": other.peak,
        }
    config = memory.config
    kept = Kept(memory.kernels, way.checkpointing, config.train.recompute_geglu)
    table = [
        {"part": term.part, "what": term.what, "bytes": term.bytes, "per": term.per}
        for term in terms(config.model, config.train.dtype, kept, memory.length)
    ]
    return {
        "zero_stage": way.stage,
        "by_stage": stages,
        "micro_batch": need.sequences,
        "accumulation": need.accumulation,
        "activation_checkpointing": way.checkpointing,
        "activations": _activations(need, memory.length),
        "terms": table,
        "kernels": memory.kernels,
        "peak": need.peak,
        "usable": int(memory.usable),
        "fits": need.peak <= memory.usable,
    }


def _activations(need: Need, length: int) -> dict[str, float]:
    found = need.activations
    return {
        "embeddings": found.embeddings,
        "layers": found.layers,
        "head": found.head,
        "kept": found.kept,
        "kept_a_token": found.kept / (need.sequences * length),
        "backward_adds": found.transient,
    }


def _run(config: Config, args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Steps, tokens, arithmetic and time. Padding doesn't exist; validation and saving are not counted."""
    train, ranks = config.train, args.nodes * args.gpus_per_node
    changing = 0 if train.batch_warmup is None else min(train.batch_warmup.steps, train.max_steps)
    sequences = sum(batch_size(train, step) for step in range(changing))
    sequences += train.global_batch_size * (train.max_steps - changing)
    mean = data["tokens_a_sequence"]
    tokens = round(sequences * mean)
    masked = round(sequences * (mean - 2) * config.data.mask_probability)
    flops = training_flops(config.model, tokens, round(sequences * mean**2), masked)
    peak = train.peak_tflops * 1e12 if train.peak_tflops else peak_of_gpu(args.gpu, train.dtype)
    if peak is None:
        raise InputError(f"--gpu {args.gpu}: its TFLOP/s in {train.dtype} are not known; give train.peak_tflops")
    if args.tokens_per_second_per_gpu:
        seconds = tokens / (ranks * args.tokens_per_second_per_gpu)
        basis = f"measured {args.tokens_per_second_per_gpu:,.0f} tokens/s a GPU"
    else:
        seconds, basis = flops / (ranks * peak * args.mfu), f"assumed MFU {args.mfu:.0%}"
    gpu_days, paper = ranks * seconds / 86400, PAPER_GPUS * PAPER_DAYS
    return {
        "steps": train.max_steps,
        "sequences": sequences,
        "tokens": tokens,
        "epochs": sequences / data["sequences"] if data["sequences"] else None,
        "matrix_flops": flops,
        "peak_tflops": peak / 1e12,
        "hours": seconds / 3600,
        "hours_from": basis,
        "mfu": flops / (seconds * ranks * peak),
        "tokens_per_second": tokens / seconds,
        "gpu_days": gpu_days,
        "paper_gpu_days": paper,
        "share_of_paper_gpu_days": gpu_days / paper,
        # As many FLOPs at peak as the paper's GPUs could have done in its time, in days of this one.
        "paper_gpu_days_at_this_peak": paper * PAPER_TFLOPS * 1e12 / peak,
    }


def _warnings(config: Config, way: Way, gpus_per_node: int) -> list[str]:
    batch, ranks, found = config.train.global_batch_size, way.nodes * gpus_per_node, []
    if ranks > batch:
        found.append(f"{ranks} GPUs for {batch} sequences a step: {ranks - batch} have nothing to do")
    elif way.micro_batch * ranks > batch:
        found.append(
            f"train.micro_batch_size {way.micro_batch} x {ranks} GPUs is over train.global_batch_size {batch}: "
            f"micro batches will have {-(-batch // ranks)} sequences"
        )
    warmup = config.train.batch_warmup
    if warmup is not None and warmup.start < ranks:
        found.append(f"train.batch_warmup.start {warmup.start}: at first {ranks - warmup.start} GPUs have nothing to do")
    return found


def _refusal(gpu: str, memory: Memory, way: Way) -> str:
    need = memory.need(way).peak
    ways = [other.words(way) for other in memory.ways_out(way)]
    remedy = "these would: " + "; or ".join(ways) if ways else "nothing that was tried would; take a GPU with more memory"
    return f"does not fit: a step needs {gigabytes(need)} a GPU, {gpu} has {gigabytes(memory.usable)} for it; {remedy}"
