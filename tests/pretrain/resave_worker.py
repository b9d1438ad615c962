"""`torchrun resave_worker.py OUT CONFIG key=value ...`: resume a run, take no step, and save it again below OUT.

Prints on rank 0, in bytes a rank: what the process had before the engine and the checkpoint, and at most afterwards.
"""

import json
import resource
import sys
from pathlib import Path

import deepspeed  # noqa: F401  # before the first figure: importing it takes memory
import torch.distributed as dist

from data_prep.cli import leave
from pretrain.saver import Saver
from tests.pretrain.lives import begin


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    out, name, *overrides = sys.argv[1:]
    before = peak()
    run = begin(name, overrides)
    loaded = peak()
    run.saver = Saver(Path(out), run.config.checkpoint, run.world, run.life, None)
    run._save()
    run._wait_for_save()
    figures = {"loaded": run.world.max(loaded - before), "saved": run.world.max(peak() - before)}
    if run.world.is_first:
        print(json.dumps(figures))
    dist.destroy_process_group()
    leave(0)
