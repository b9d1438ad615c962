"""`torchrun gradient_worker.py OUT CONFIG key=value ...`: the gradients of the first global batch, dropout on, to OUT."""

import sys
from pathlib import Path
from typing import Any

import torch

from data_prep.cli import leave
from pretrain import zero_step
from pretrain.config import load_config
from pretrain.train import train

if __name__ == "__main__":
    out, name, *overrides = sys.argv[1:]
    real_norm = zero_step.squared_norm

    def keep_gradients(engine: Any) -> torch.Tensor:
        if engine.global_rank == 0:
            gradients = {n: p.grad.clone() for n, p in engine.module.named_parameters()}
            torch.save(gradients, Path(out))
        return real_norm(engine)

    zero_step.squared_norm = keep_gradients
    train(load_config(name, [*overrides, "deepspeed.zero_stage=0", "train.max_steps=1"]))
    leave(0)
