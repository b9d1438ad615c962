"""How long steps take, and which rank holds the others up.

Collectives make every rank's step equally long, because the fast ones wait in them for the slow one. So a rank is judged by
what it does alone, its busy time: the forward passes, which hold no collective at ZeRO stages 0 to 2, and what else keeps
the others waiting, such as its own wait for data. At stage 3 forward passes gather weights, and the ranks look more alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class StepTimer:
    """The steps of one rank in one interval of reporting.

    A step lasts from `start_step` to `end_step`; what a run does between two steps (validation, reports, saving) belongs to
    none. On a GPU both ends are events in its stream: nothing waits for them before `summary`, and a step that the CPU has
    only queued is as long as it takes the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._clear()

    def _clear(self) -> None:
        self._steps: list[tuple[Any, Any]] = []
        self._passes: list[tuple[Any, Any]] = []

    def start_step(self) -> None:
        self._started = self._now()

    def end_step(self) -> None:
        self._steps.append((self._started, self._now()))

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Around a forward pass: its time is this rank's own."""
        started = self._now()
        yield
        self._passes.append((started, self._now()))

    def summary(self) -> dict[str, float]:
        """Seconds of the steps that ended since the last summary (at least one has), and of this rank's own work in them.

        Keys: `step_seconds_p50`, `step_seconds_p90` (interpolated), `step_seconds_max`, and `busy_seconds`, a sum.
        """
        steps = [self._seconds(*span) for span in self._steps]
        busy = sum(self._seconds(*span) for span in self._passes)
        self._clear()
        p50, p90, longest = np.percentile(steps, (50, 90, 100)).tolist()
        return {"step_seconds_p50": p50, "step_seconds_p90": p90, "step_seconds_max": longest, "busy_seconds": busy}

    def _now(self) -> Any:
        """This moment: a reading of the clock, or on a GPU an event."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def slowest(busy_by_rank: Sequence[float]) -> tuple[int, float]:
    """The rank with the largest busy time, and how many times the median that is.

    Of an even number of ranks the lower one of the middle pair counts as the median: of two ranks that is the other one.
    """
    rank = max(range(len(busy_by_rank)), key=busy_by_rank.__getitem__)
    median = statistics.median_low(busy_by_rank)
    return rank, busy_by_rank[rank] / median if median else 1.0
