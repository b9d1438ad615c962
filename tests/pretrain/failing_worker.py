"""`torchrun failing_worker.py HOW ARGUMENTS...`: `python -m pretrain ARGUMENTS`, where rank 1 fails after its second step.

HOW is `at once` (out of memory in the middle of the third step) or `slow` (it can't read its data, while all ranks take
their time to write a checkpoint).
"""

import sys
import time
from typing import Any

from data_prep.cli import InputError, leave, main
from pretrain import checkpoint
from pretrain.__main__ import build_parser
from pretrain.train import _Run

if __name__ == "__main__":
    how = sys.argv[1]
    real_step, real_next, real_write = _Run._train_step, _Run._next_batches, checkpoint.write_rank

    def train_step(run: _Run, *arguments: Any) -> Any:
        if run.world.rank == 1 and run.step == 2 and how == "at once":
            raise MemoryError("no room for activations")
        return real_step(run, *arguments)

    class Unreadable:
        waited = 0.0

        def __next__(self) -> Any:
            raise InputError("a block is damaged")

        def close(self) -> None: ...

    def next_batches(run: _Run) -> Any:
        if run.world.rank == 1 and run.step == 2 and how == "slow":
            run.batches = Unreadable()  # type: ignore[assignment]
        return real_next(run)

    def write_rank(*arguments: Any) -> Any:
        time.sleep(2 if how == "slow" else 0)
        return real_write(*arguments)

    _Run._train_step = train_step  # type: ignore[method-assign]
    _Run._next_batches = next_batches  # type: ignore[method-assign]
    checkpoint.write_rank = write_rank
    leave(main(build_parser(), sys.argv[2:]))
