"""`torchrun resave_worker.py OUT CONFIG key=value ...`: resume a run, take no step, and save it again below OUT."""

import sys
from pathlib import Path

import torch.distributed as dist

from data_prep.cli import leave
from pretrain.config import load_config
from pretrain.train import _Run

if __name__ == "__main__":
    out, name, *overrides = sys.argv[1:]
    config = load_config(name, overrides)
    run = _Run(config, Path(config.run_dir))
    run.run_dir = Path(out)
    run._save()
    dist.destroy_process_group()
    leave(0)
