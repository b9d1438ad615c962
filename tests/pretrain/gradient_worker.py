"""`torchrun gradient_worker.py OUT CONFIG key=value ...`: the gradients of the first global batch, dropout on, to OUT."""

import sys
from pathlib import Path
from typing import Any

import torch

import pretrain.train
from data_prep.cli import leave
from pretrain.config import load_config

if __name__ == "__main__":
    out, name, *overrides = sys.argv[1:]

    def keep_gradients(engine: Any) -> None:
        if engine.global_rank == 0:
            gradients = {n: p.grad.clone() for n, p in engine.module.named_parameters()}
            torch.save(gradients, Path(out))

    pretrain.train.gradient_norm_before_step = lambda engine: (keep_gradients(engine), 0.0)[1]
    pretrain.train.train(load_config(name, [*overrides, "deepspeed.zero_stage=0", "train.max_steps=1"]))
    leave(0)
