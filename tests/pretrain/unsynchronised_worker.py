"""`python unsynchronised_worker.py ARGUMENTS...`: `python -m pretrain ARGUMENTS`, where a step must not wait for the GPU.

But for the first one of a life: what is made once may wait.
"""

import sys
from typing import Any

import torch

from data_prep.cli import leave, main
from pretrain.__main__ import build_parser
from pretrain.training_step import TrainingSteps

if __name__ == "__main__":
    real_take, steps = TrainingSteps.take, 0

    def synchronize(*_: Any) -> None:
        raise RuntimeError("the host waits for the whole GPU")

    def take(*arguments: Any) -> None:
        global steps
        steps += 1
        if steps == 1:
            real_take(*arguments)
            return
        real_synchronize, torch.cuda.synchronize = torch.cuda.synchronize, synchronize  # the mode below doesn't see these
        torch.cuda.set_sync_debug_mode("error")
        try:
            real_take(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize = real_synchronize

    TrainingSteps.take = take  # type: ignore[method-assign,assignment]
    leave(main(build_parser(), sys.argv[1:]))
