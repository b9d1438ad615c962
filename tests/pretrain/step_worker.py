"""`torchrun step_worker.py`: training steps of each ZeRO stage, and what they do besides computing, as JSON on rank 0.

[{stage, optimizer, dtype, reads, micro, boundary}]. reads: operations by which the host reads a number of the device or puts
one of its own there (on a GPU it would wait), but for the model's forward pass, where the operations for a CPU look at what
those for a GPU don't. micro, boundary: collectives until the end of the backward pass before the last, and after it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.cli import leave
from pretrain import distributed, zero_state
from pretrain.bad_steps import BadSteps
from pretrain.config import Config
from pretrain.engine import build_engine
from pretrain.timing import StepTimer
from pretrain.training_step import TrainingSteps
from tests.pretrain.optimizer_worker import MASKED, SEQUENCES, STD, batches, case

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh"}


class Watch(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.reads: set[str] = set()
        self.in_forward = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.seen[f"{function.namespace}::{name}"] += 1
        if name in WAITING and not self.in_forward:
            self.reads.add(name)
        return function(*args, **(kwargs or {}))

    def collectives(self) -> int:
        return sum(count for name, count in self.seen.items() if name.startswith("c10d::"))


def trial(config: Config, world: distributed.World) -> dict[str, Any]:
    engine = build_engine(config, world)
    zero_state.load(engine, zero_state.InitialState(zero_state.shapes(engine), 0, STD))
    steps = TrainingSteps(config, world, engine, BadSteps(config.bad_steps, world.device), StepTimer(world.device))
    marks: list[int] = []
    watch, real = Watch(), engine.backward

    def backward(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        marks.append(watch.collectives())
        return result

    engine.backward = backward
    engine.module.register_forward_pre_hook(lambda *_: setattr(watch, "in_forward", True))
    engine.module.register_forward_hook(lambda *_: setattr(watch, "in_forward", False))
    mine = batches(0, world.rank, world.size)
    steps.take(mine, MASKED, 0, 0, SEQUENCES)  # what is made once
    marks.clear()
    with watch:
        steps.take(mine, MASKED, 1, SEQUENCES, SEQUENCES)
    steps.read()
    return {
        "stage": config.deepspeed.zero_stage,
        "optimizer": config.optimizer.name,
        "dtype": config.train.dtype,
        "reads": sorted(watch.reads),
        "micro": marks[-2],
        "boundary": watch.collectives() - marks[-2],
    }


if __name__ == "__main__":
    world = distributed.start()
    found = []
    for name in ("adamw-0", "adamw-1", "adamw-2", "adamw-3", "lamb-1-apart"):
        config = case(name)
        dtypes = ("fp32",) if name == "adamw-0" else ("fp32", "bf16")
        for dtype in dtypes:
            found.append(trial(config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})}), world))
    if world.is_first:
        print(json.dumps(found))
    dist.destroy_process_group()
    leave(0)
