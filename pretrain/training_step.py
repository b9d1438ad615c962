"""One training step after another, without the host waiting for the device; what came of them is read some steps later.

Loss, accuracy and gradient norm of a step are summed over the ranks in one small all-reduce on the device and judged there
(`pretrain/bad_steps.py`), and the optimizer obeys the verdict. So the host only queues work, and a GPU never runs dry while
Python prepares the next step. `read` waits once for all steps since the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import zero_step
from pretrain.bad_steps import BadSteps
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.engine import set_learning_rate
from pretrain.loader import MaskedBatch
from pretrain.schedule import learning_rate
from pretrain.timing import StepTimer


@dataclass(frozen=True)
class Taken:
    """A step that was taken, or left out."""

    step: int  # counted from 1: how many there are with it
    position: int  # in the order of training, where its global batch begins
    size: int  # sequences of that
    loss: float  # of the global batch: nats a masked token
    masked_accuracy: float
    grad_norm: float
    learning_rate: float
    reason: str | None  # why no update was made
    in_a_row: int  # bad steps that end with it
    suspects: list[int]  # of a bad step: micro batches whose loss is not finite, rank x micro batches of a rank + number


@dataclass(frozen=True)
class _Queued:
    """What the host knows of a step, and where the device writes the rest."""

    step: int
    position: int
    size: int
    learning_rate: float
    row: Tensor  # fp64 [6]: loss, accuracy, norm, and what `BadSteps.judge` returns
    finite_k: Tensor  # bool [micro batches of this rank], whether the loss is


class TrainingSteps:
    """The steps of one rank; all ranks call everything alike.

    Args:
        timer: is told of every forward pass.
    """

    def __init__(self, config: Config, world: World, engine: Any, bad_steps: BadSteps, timer: StepTimer) -> None:
        self._config, self._world, self._engine = config, world, engine
        self._bad_steps, self._timer = bad_steps, timer
        self._queued: list[_Queued] = []

    def take(self, batches: Sequence[MaskedBatch], masked: float, step: int, position: int, size: int) -> None:
        """Queue one optimizer step, or none where it would be a bad one.

        Args:
            batches: this rank's micro batches, as many as every other rank has.
            masked: predicted tokens of the global batch, by whose number its loss is divided.
            step: how many steps came before it.
        """
        engine, world, masked = self._engine, self._world, max(masked, 1.0)
        rate = learning_rate(self._config.optimizer, step, self._config.train.max_steps)
        set_learning_rate(engine, rate)
        losses, rights = [], []
        for number, batch in enumerate(batches, 1):
            engine.set_gradient_accumulation_boundary(number == len(batches))
            on_device = batch.to(world.device)
            with self._timer.compute():
                loss, right = engine(on_device.packed, on_device.index_m, on_device.labels_m)
            # DeepSpeed averages over ranks; the loss is the mean over the masked tokens of the whole batch.
            engine.backward(loss * (world.size / masked), scale_wrt_gas=False)
            losses.append(loss.detach().double())
            rights.append(right.double())
        losses_k = torch.stack(losses)
        sums = torch.stack([losses_k.sum(), torch.stack(rights).sum(), zero_step.squared_norm(engine)])
        dist.all_reduce(sums)
        loss, accuracy, norm = sums[0] / masked, sums[1] / masked, sums[2].sqrt()
        verdict = self._bad_steps.judge(loss, norm)
        zero_step.step(engine, verdict[0].float(), self._scale(norm))
        row = torch.cat([torch.stack([loss, accuracy, norm]), verdict])
        self._queued.append(_Queued(step + 1, position, size, rate, row, losses_k.isfinite()))

    def _scale(self, norm: Tensor) -> Tensor | None:
        """What to divide gradients by, so that their norm is at most that of the configuration."""
        limit = self._config.optimizer.gradient_clipping
        return ((norm + 1e-6) / limit).clamp(min=1.0).float() if limit else None

    def read(self) -> list[Taken]:
        """What came of the steps since the last call; waits for them, and is a collective."""
        queued, self._queued = self._queued, []
        if not queued:
            return []
        taken = []
        for each, values in zip(queued, torch.stack([each.row for each in queued]).tolist(), strict=True):
            loss, accuracy, norm, bad, in_a_row, median = values
            reason = self._bad_steps.reason(loss, norm, median) if bad else None
            suspects = self._suspects(each.finite_k) if bad else []
            known, rate = (each.step, each.position, each.size), each.learning_rate
            taken.append(Taken(*known, loss, accuracy, norm, rate, reason, int(in_a_row), suspects))
        return taken

    def _suspects(self, finite_k: Tensor) -> list[int]:
        rank, micro = self._world.rank, len(finite_k)
        mine = [rank * micro + number for number, finite in enumerate(finite_k.tolist()) if not finite]
        table = [0.0] * (self._world.size * micro)
        for number in mine:
            table[number] = 1.0
        return [number for number, found in enumerate(self._world.sum(*table)) if found]
