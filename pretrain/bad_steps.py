"""Which steps to leave out: a loss or gradient that is not finite, or a gradient norm far above those before it.

All ranks judge the same two numbers, so they leave out the same steps. What the judgement rests on is part of a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    """

    def __init__(self, config: BadStepsConfig, state: dict[str, Any] | None = None) -> None:
        state = state or {"norms": [], "in_a_row": 0}
        self._config = config
        self._norms: deque[float] = deque(state["norms"], maxlen=config.window)
        self.in_a_row = int(state["in_a_row"])

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "in_a_row": self.in_a_row}

    def judge(self, loss: float, norm: float) -> str | None:
        """Why the step must be left out, or None; counts it."""
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = "a gradient is not finite"
        elif self._config.norm_factor and len(self._norms) == self._config.window:
            median = statistics.median(self._norms)
            if norm > self._config.norm_factor * median:
                reason = f"the gradient norm {norm:.4g} is over {self._config.norm_factor:g} times the median {median:.4g}"
        if reason is None:
            self._norms.append(norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
        return reason


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


def described(loader: Loader, config: Config, ranks: int, position: int, suspects: Sequence[int]) -> dict[str, Any]:
    """The sequences of the global batch that begins at `position`: of its suspects where there are any, else all of them.

    Args:
        suspects: micro batches whose loss is not finite, counted over all ranks: rank x micro batches of a rank + number.

    Returns:
        `positions` [first, last + 1] of the batch; `suspects`, whether the list is of them only; `sequences`, a list of
        [shard, sequence of the shard], as in `train/<shard>.tar`.
    """
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
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
