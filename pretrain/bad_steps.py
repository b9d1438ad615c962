"""Which steps to leave out: a loss or gradient that is not finite, or a gradient norm far above those before it.

All ranks judge the same two numbers, so they leave out the same steps. They are judged where they are, on the device; the
host hears of it when it reads the verdicts of several steps at once. What the judgement rests on is part of a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.cli import write_atomically
from pretrain.config import BadStepsConfig, Config
from pretrain.loader import Loader
from pretrain.metrics import read_metrics
from pretrain.order import micro_batches, rank_rows


class BadSteps:
    """Judges one step after another.

    A norm is a spike when it is over `norm_factor` times the median of the last `window` norms of good steps. A median,
    because one spike that was let through must not move the threshold; a factor rather than a number of standard
    deviations, because norms that hardly vary would make every step a spike.

    Args:
        state: what `state` gave when a checkpoint was saved.
    """

    def __init__(self, config: BadStepsConfig, device: torch.device, state: dict[str, Any] | None = None) -> None:
        norms, in_a_row = ([], 0) if state is None else (state["norms"][-config.window :], int(state["in_a_row"]))
        self._config = config
        # A ring: the norm of good step number n stands at n modulo the window.
        self._norms_w = torch.tensor(norms + [0.0] * (config.window - len(norms)), dtype=torch.float64, device=device)
        self._places_w = torch.arange(config.window, device=device)
        self._good = torch.tensor(len(norms), device=device)
        self._in_a_row = torch.tensor(in_a_row, device=device)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; waits for the device."""
        norms, good = self._norms_w.tolist(), int(self._good)
        oldest = good % len(norms)
        norms = norms[oldest:] + norms[:oldest] if good >= len(norms) else norms[:good]
        return {"norms": norms, "in_a_row": int(self._in_a_row)}

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step must be left out; counts it. Nothing waits for the device.

        Args:
            loss: fp64 scalar on the device, of the global batch.
            norm: the same, of its gradient.

        Returns:
            fp64 [3] on the device: 1 where it is bad, else 0; how many bad ones in a row it ends; the median of the norms.
        """
        window = self._config.window
        ordered_w = self._norms_w.sort().values
        median = (ordered_w[(window - 1) // 2] + ordered_w[window // 2]) / 2
        good = loss.isfinite() & norm.isfinite()
        if self._config.norm_factor:
            good &= (norm <= self._config.norm_factor * median) | (self._good < window)
        here_w = (self._places_w == self._good % window) & good
        self._norms_w = torch.where(here_w, norm, self._norms_w)
        self._good = self._good + good
        self._in_a_row = (self._in_a_row + 1) * ~good
        return torch.stack([(~good).double(), self._in_a_row.double(), median])

    def reason(self, loss: float, norm: float, median: float) -> str:
        """Why a bad step was one."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return "a gradient is not finite"
        return f"the gradient norm {norm:.4g} is over {self._config.norm_factor:g} times the median {median:.4g}"


class BadStepsFile:
    """RUN_DIR/bad_steps.jsonl: an object a step that was left out, with what was in it. Written by rank 0."""

    def __init__(self, run_dir: Path, restored_step: int) -> None:
        self.path = run_dir / "bad_steps.jsonl"
        if self.path.is_file():  # like the metrics: what lies beyond the restored step comes again
            kept = [record for record in read_metrics(self.path) if record["step"] <= restored_step]
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Add one step; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a") as stream:
            stream.write(json.dumps(finite) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def described(
    loader: Loader, config: Config, ranks: int, position: int, size: int, suspects: Sequence[int]
) -> dict[str, Any]:
    """The sequences of the global batch of `size` that begins at `position`: of its suspects where there are any, else all.

    Args:
        suspects: micro batches whose loss is not finite, counted over all ranks: rank x micro batches of a rank + number.

    Returns:
        `positions` [first, last + 1] of the batch; `suspects`, whether the list is of them only; `sequences`, a list of
        [shard, sequence of the shard], as in `train/<shard>.tar`.
    """
    micro = config.train.micro_batch_size
    each = micro_batches(size, ranks, micro)
    rows: list[int] = []
    for number in suspects:
        rank, batch = divmod(number, each)
        rows += list(rank_rows(size, rank, ranks))[batch * micro : (batch + 1) * micro]
    positions = position + np.array(rows or range(size), np.int64)
    shards, sequences = loader.order.places(positions)
    return {
        "positions": [position, position + size],
        "suspects": bool(rows),
        "sequences": [[int(shard), int(sequence)] for shard, sequence in zip(shards, sequences, strict=True)],
    }
