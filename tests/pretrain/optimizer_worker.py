"""`torchrun optimizer_worker.py OUT [SOURCE]`: trains under each of CASES, and saves what came of it to OUT/<case>.

Four steps on six sequences each, two micro batches a rank; in the second one a gradient is not finite. With SOURCE, the OUT
of another call, each case goes on from what that saved after two steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.cli import leave
from pretrain import checkpoint, distributed, zero_state
from pretrain.bad_steps import BadSteps
from pretrain.checkpoint import Checkpoint
from pretrain.config import Config, load_config
from pretrain.engine import build_engine
from pretrain.loader import MaskedBatch
from pretrain.model import Packed
from pretrain.timing import StepTimer
from pretrain.training_step import TrainingSteps

STEPS, BAD_STEP, SAVED_STEP = 4, 1, 2
SEQUENCES, LENGTH = 6, 7
MASKED = 2 * SEQUENCES  # predicted tokens of a global batch
STD = 0.3  # of the start values: large, so that trust ratios of matrices differ
CASES = {  # name: (ZeRO stage, optimizer, whether LayerNorms and biases are decayed)
    **{f"{name}-{stage}": (stage, name, True) for name in ("lamb", "adamw") for stage in (0, 1, 2, 3)},
    **{f"{name}-{stage}-apart": (stage, name, False) for name in ("lamb", "adamw") for stage in (0, 1, 2, 3)},
}


def case(name: str) -> Config:
    stage, optimizer, decay = CASES[name]
    model = ["vocab_size=25", "hidden_size=24", "num_hidden_layers=2", "num_attention_heads=3", "intermediate_size=20"]
    overrides = [f"model.{value}" for value in (*model, "hidden_dropout_prob=0.0")]
    overrides += [
        f"deepspeed.zero_stage={stage}",
        f"optimizer.name={optimizer}",
        f"optimizer.decay_norms_and_biases={decay}",
    ]
    overrides += ["optimizer.weight_decay=0.1", "optimizer.learning_rate=0.01", "optimizer.gradient_clipping=0.5"]
    overrides += ["optimizer.warmup_steps=0", f"train.max_steps={STEPS}", "train.micro_batch_size=2"]
    overrides += ["optimizer.eps=1e-3"]  # far above rounding: keys' biases have no gradient but that
    return load_config("tiny", ["data.path=none", *overrides])


def batches(step: int, rank: int, ranks: int) -> list[MaskedBatch]:
    """Two micro batches, the first with one sequence."""
    generator = torch.Generator().manual_seed(step)
    ids_bt = torch.randint(5, 25, (SEQUENCES, LENGTH), generator=generator)[rank * SEQUENCES // ranks :][
        : SEQUENCES // ranks
    ]
    found = []
    for part in (ids_bt[:1], ids_bt[1:]):
        ends = torch.arange(len(part) + 1, dtype=torch.int32) * LENGTH
        index = (torch.arange(len(part))[:, None] * LENGTH + torch.tensor([1, 4])).flatten()
        packed = Packed(part.flatten(), ends, LENGTH)
        found.append(MaskedBatch(packed, index, part.flatten()[index], ends[:-1].numpy()))
    return found


def spoil(_: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    output[0].register_hook(lambda gradient: gradient * float("nan"))
    return output


def run(name: str, world: distributed.World, out: Path, source: Path | None) -> None:
    config = case(name)
    engine = build_engine(config, world)
    shapes, first = zero_state.shapes(engine), 0
    if source is None:
        zero_state.load(engine, zero_state.InitialState(shapes, 0, STD))
    else:
        saved = Checkpoint(checkpoint.step_path(source / name, SAVED_STEP))
        zero_state.load(engine, saved)
        first = SAVED_STEP
    steps = TrainingSteps(config, world, engine, BadSteps(config.bad_steps, world.device), StepTimer(world.device))
    for step in range(first, STEPS):
        bad = step == BAD_STEP and world.rank == world.size - 1
        handle = engine.module.register_forward_hook(spoil) if bad else None
        steps.take(batches(step, world.rank, world.size), MASKED, step, step * SEQUENCES, SEQUENCES)
        if handle is not None:
            handle.remove()
        if step + 1 in (SAVED_STEP, STEPS):
            reasons = [taken.reason for taken in steps.read()]
            assert [reason for reason in reasons if reason] == ["a gradient is not finite"] * (step + 1 == SAVED_STEP), (
                reasons
            )
            save(engine, world, config, out / name, step + 1)


def save(engine: Any, world: distributed.World, config: Config, out: Path, step: int) -> None:
    counts = {float(state["step"]) for state in zero_state.inner_optimizer(engine).state.values()}
    assert counts == {float(step - 1)}, counts  # all but the bad one
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, list(zero_state.owned_fragments(engine, world.rank, world.size)))
    if world.is_first:
        checkpoint.save(
            out,
            step=step,
            life="worker",
            fragments=[fragment for rank in gathered for fragment in rank],
            shapes=zero_state.shapes(engine),
            model=config.model.model_dump(),
            state={"optimizer_step": step - 1},
        )


if __name__ == "__main__":
    out, *source = map(Path, sys.argv[1:])
    world = distributed.start()
    for name in CASES:
        run(name, world, out, source[0] if source else None)
    dist.destroy_process_group()
    leave(0)
