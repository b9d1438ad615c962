"""`torchrun failing_worker.py ARGUMENTS...`: `python -m pretrain ARGUMENTS`, where rank 1 fails in its third step."""

import sys
from typing import Any

from data_prep.cli import leave, main
from pretrain.__main__ import build_parser
from pretrain.train import _Run

if __name__ == "__main__":
    real_step = _Run._train_step

    def train_step(run: _Run, *arguments: Any) -> Any:
        if run.world.rank == 1 and run.step == 2:
            raise MemoryError("no room for activations")
        return real_step(run, *arguments)

    _Run._train_step = train_step  # type: ignore[method-assign]
    leave(main(build_parser(), sys.argv[1:]))
