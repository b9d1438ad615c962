"""`python -m pretrain bench-checkpoint`: for how long a save stops training, ours and DeepSpeed's, in one run.

Rounds alternate, on random tokens: some steps, a save of ours and the steps beside which it is written, then the same state
by `engine.save_checkpoint`, which training has to wait for. Ours hashes and fsyncs every file before it commits; DeepSpeed's
does neither, so its bytes may still be in memory when it returns. Started alone, or by torchrun for several ranks.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.cli import log
from kernels.random import PURPOSE_DROPOUT, fork, root_key
from pretrain import checkpoint, zero_state, zero_step
from pretrain.config import CheckpointConfig, load_config
from pretrain.distributed import World, start
from pretrain.engine import build_engine, set_learning_rate
from pretrain.masking import FIRST_CONTENT
from pretrain.model import Packed
from pretrain.saver import Saver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("config", nargs="?", default="tiny", metavar="CONFIG", help="a YAML file or preset (default: tiny)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as deepspeed.zero_stage=3")
    parser.add_argument("--dir", type=Path, default=Path("."), metavar="DIR", help="where to write: the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="saves of each kind, after one to warm up")
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="of 128 tokens, a step and rank (default: 8)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: measure and log a summary."""
    config = load_config(args.config, [f"run_dir={args.dir}", "data.path=none", *args.overrides])
    size = config.train.micro_batch_size  # a step is one micro batch
    world = start()
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": size * world.size})})
    engine = build_engine(config, world)
    shapes = zero_state.shapes(engine)
    zero_state.load(engine, zero_state.InitialState(shapes, 0, config.model.initializer_range))
    steps = _Steps(engine, world, args.sequences, config.model.vocab_size)

    name = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=args.dir) if world.is_first else ""
    if world.is_first:
        world.store.set("directory", name)
    directory = Path(world.store.get("directory").decode())
    try:
        saver, model = Saver(directory, CheckpointConfig(keep_last=1), world, "bench", None), config.model.model_dump()
        rounds = [
            _round(engine, world, steps, saver, shapes, directory, number, model) for number in range(1 + args.rounds)
        ][1:]
        newest = checkpoint.step_path(directory, args.rounds)
        written = sum(path.stat().st_size for path in newest.iterdir())
        world.barrier()
    finally:
        if world.is_first:
            shutil.rmtree(directory, ignore_errors=True)
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    for key, value in medians.items():
        if world.is_first:
            log(f"{key:32} {value:10.4f}")
    result = {
        **medians,
        "ratio_deepspeed": medians["stall_seconds"] / medians["deepspeed_stall_seconds"],
        "rounds": rounds,
        "gigabytes": written / 1e9,
        "ranks": world.size,
        "zero_stage": config.deepspeed.zero_stage,
        "dtype": config.train.dtype,
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    dist.destroy_process_group()
    return result


class _Steps:
    """Training steps on one batch of random tokens."""

    def __init__(self, engine: Any, world: World, sequences: int, vocab_size: int, length: int = 128) -> None:
        self._engine, self._world = engine, world
        generator = torch.Generator().manual_seed(world.rank)
        ids_t = torch.randint(FIRST_CONTENT, vocab_size, (sequences * length,), generator=generator)
        starts = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
        keys_t = fork(root_key(0, PURPOSE_DROPOUT), torch.arange(sequences * length))
        self._batch = Packed(ids_t, starts, length, keys_t).to(world.device)
        self._index_m = torch.arange(0, sequences * length, 7, device=world.device)
        self._take = torch.zeros((), device=world.device)  # what leaves no step out

    def take(self) -> float:
        """Seconds of one step, until every rank has taken it."""
        began = time.perf_counter()
        loss, _ = self._engine(self._batch, self._index_m, self._batch.ids_t[self._index_m])
        self._engine.backward(loss / len(self._index_m))
        set_learning_rate(self._engine, 1e-4)
        zero_step.step(self._engine, self._take, None)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        self._world.barrier()
        return time.perf_counter() - began


def _round(
    engine: Any,
    world: World,
    steps: _Steps,
    saver: Saver,
    shapes: dict[str, tuple[int, ...]],
    directory: Path,
    number: int,
    model: dict[str, Any],
) -> dict[str, float]:
    """One save of each kind; seconds, of the slowest rank.

    `stall_seconds`: for which ours stops training; `committed_seconds`: until it is whole on the disk; `step_seconds` and
    `step_beside_save_seconds`: of a step without and beside a save; `lost_seconds`: the stall and what that step was longer,
    where cores are shared; `deepspeed_stall_seconds`: all of DeepSpeed's.
    """
    alone = statistics.median(steps.take() for _ in range(3))
    began = time.perf_counter()
    fragments = zero_state.owned_fragments(engine, world.rank, world.size)
    saver.start(number, fragments, shapes, model, {"optimizer_step": number})
    stall = time.perf_counter() - began
    beside = steps.take()
    saver.wait()
    world.barrier()
    committed = time.perf_counter() - began

    began = time.perf_counter()
    engine.save_checkpoint(str(directory / "deepspeed"), tag=f"round{number}")
    world.barrier()
    theirs = time.perf_counter() - began
    if world.is_first:
        shutil.rmtree(directory / "deepspeed")
    world.barrier()
    seconds = {
        "stall_seconds": stall,
        "committed_seconds": committed,
        "step_seconds": alone,
        "step_beside_save_seconds": beside,
        "lost_seconds": stall + max(0.0, beside - alone),
        "deepspeed_stall_seconds": theirs,
    }
    return {key: world.max(value) for key, value in seconds.items()}
