"""A Python for job scripts (PYTHON=...): the real one, but that it can be held or killed at a chosen point.

    GATE=FILE GATE_STEP=N   `pretrain train` stands before update N while FILE is there, or until it is told to stop
    GATE_DEAF=1             but doesn't hear that
    FAIL_ONCE=FILE          `data_prep shard` removes FILE, where there is one, and is killed after its first unit

So a test decides what a job has done by the time that Slurm ends it, however fast the machine is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def hold() -> None:
    from pretrain import train, zero_step

    gate, at = Path(os.environ["GATE"]), int(os.environ["GATE_STEP"])
    real_step, real_run, stops = zero_step.step, train._Run.run, []
    updates = 0

    def run(self: Any, *arguments: Any) -> Any:
        nonlocal updates
        updates = self.step
        stops.append(self.stop)
        return real_run(self, *arguments)

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal updates
        updates += 1
        while updates == at and gate.exists() and ("GATE_DEAF" in os.environ or not stops[0].received):
            time.sleep(0.1)
        return real_step(*arguments, **options)

    train._Run.run, zero_step.step = run, step  # type: ignore[method-assign]


def die() -> None:
    from data_prep import shard

    real = shard._UnitBuilder.close

    def close(self: Any) -> Any:
        marker = real(self)
        try:
            Path(os.environ["FAIL_ONCE"]).unlink()
        except FileNotFoundError:
            return marker
        os.kill(os.getpid(), signal.SIGKILL)

    shard._UnitBuilder.close = close  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as under python -m
    from data_prep.cli import leave, main

    if sys.argv[1:4] == ["-m", "pretrain", "train"] and "GATE" in os.environ:
        from pretrain.__main__ import build_parser

        hold()
        leave(main(build_parser(), sys.argv[3:]))
    elif sys.argv[1:4] == ["-m", "data_prep", "shard"] and "FAIL_ONCE" in os.environ:
        from data_prep.__main__ import run

        die()
        leave(run(sys.argv[3:]))
    else:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
