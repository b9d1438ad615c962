"""`torchrun profiling_worker.py RUN_DIR TRAINED COLLECTIVE`: steps 8 and on of a life, of which two are profiled."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.cli import leave
from pretrain.profiling import Profile

if __name__ == "__main__":
    run_dir, trained, collective = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "collective"
    dist.init_process_group("gloo")
    profile = Profile(run_dir, dist.get_rank(), first_step=8, steps=2)
    gradient, weights = torch.ones(200_000), torch.rand(100, 100)
    for step in range(8, 8 + trained):
        weights = (weights @ weights).softmax(-1)
        if collective:
            dist.all_reduce(gradient)
        profile.step_done(step)
    profile.close()
    dist.barrier()
    leave(0)
