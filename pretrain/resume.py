"""Where a starting run goes on: all ranks verify what was saved, and agree on the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, DamagedError
from pretrain.distributed import World

NONE = -1  # what rank 0 shares in place of a step
WENT_BACK_TO = "went_back_to"  # key of a checkpoint's state


def find_checkpoint(run_dir: Path, world: World, from_step: int | None) -> Checkpoint | None:
    """The newest step that verifies, or `from_step`; None where no step was ever committed. A collective; changes nothing.

    Raises InputError, on every rank, when there are steps but none is whole, or `from_step` is missing or damaged.
    """
    committed: list[int] = []
    failure: Exception | None = None
    if world.is_first:
        try:
            committed = _candidates(run_dir, from_step)
        except Exception as error:
            failure = error
    candidates = list(committed)
    while True:
        (number,) = world.agree(failure, (candidates.pop() if candidates else NONE) if world.is_first else 0)
        if number == NONE:
            break
        found, damaged = None, False
        try:
            found = Checkpoint(checkpoint.step_path(run_dir, int(number)))
            found.verify(world.rank, world.size)
        except DamagedError as error:
            log(f"damaged checkpoint: {error}")
            damaged = True
        except Exception as error:
            failure = error
        (damages,) = world.agree(failure, damaged)
        if not damages:
            return found
    if committed:
        failure = checkpoint.none_whole(run_dir, committed)
        if from_step is not None:
            others = ", ".join(str(step) for step in checkpoint.steps(run_dir) if step != from_step) or "none"
            failure = InputError(f"{run_dir}: step {from_step} is damaged; nothing was changed. Other steps: {others}")
    world.agree(failure)
    return None


def _candidates(run_dir: Path, from_step: int | None) -> list[int]:
    """Steps to try, the last one first."""
    committed = checkpoint.steps(run_dir)
    if from_step is None:
        return committed
    if from_step not in committed:
        known = ", ".join(map(str, committed)) or "none"
        raise InputError(f"{run_dir}: no checkpoint of step {from_step} to go back to; there are: {known}")
    return [from_step]


def went_back_to(run_dir: Path) -> int | None:
    """The step that the run last went back to, as its newest step that can be opened tells."""
    for step in reversed(checkpoint.steps(run_dir)):
        try:
            state: dict[str, Any] = Checkpoint(checkpoint.step_path(run_dir, step)).state
        except DamagedError:
            continue
        return state.get(WENT_BACK_TO)
    return None
