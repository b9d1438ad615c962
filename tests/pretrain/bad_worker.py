"""`torchrun bad_worker.py KIND STEP,STEP... CONFIG key=value ...`: train, with bad numbers on the last rank in these steps.

KIND is `loss` (its last micro batch has a loss that is not a number), `gradient` (its gradient has one, the loss is finite)
or `spike` (a gradient many times too large).
"""

import math
import sys
from typing import Any

import torch

from data_prep.cli import leave, main
from pretrain.__main__ import build_parser
from pretrain.train import _Run

FACTORS = {"loss": math.nan, "gradient": math.nan, "spike": 1e4}

if __name__ == "__main__":
    kind, steps = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}
    real_step = _Run._train_step

    def train_step(run: _Run, batches: Any, masked: float) -> Any:
        if run.step + 1 not in steps or run.world.rank < run.world.size - 1:
            return real_step(run, batches, masked)
        module, calls = run.engine.module, [0]

        def spoil(_: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            calls[0] += 1
            loss, correct = output
            if calls[0] < len(batches) - (len(batches[-1].positions_b) == 0):
                return output
            if kind == "loss":
                return loss * math.nan, correct
            loss.register_hook(lambda gradient: gradient * FACTORS[kind])
            return loss, correct

        handle = module.register_forward_hook(spoil)
        try:
            return real_step(run, batches, masked)
        finally:
            handle.remove()

    _Run._train_step = train_step  # type: ignore[method-assign]
    leave(main(build_parser(), sys.argv[3:]))
