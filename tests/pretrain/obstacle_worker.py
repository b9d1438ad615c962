"""`torchrun obstacle_worker.py`: each rank chooses as if it had a GPU where all works, but the last rank's is old.

Prints what each rank ends with: by itself, and where the configuration asks for one that the last rank can't use.
"""

from typing import Any

import torch

from data_prep.cli import InputError, leave
from kernels import choice
from pretrain import distributed
from pretrain.config import load_config
from pretrain.implementations import choose

if __name__ == "__main__":
    world = distributed.start()
    real_use = choice.use

    def obstacles(*_: Any) -> dict[tuple[str, str], str]:
        failed = ("layer_norm", "triton"), ("geglu", "triton")
        return dict.fromkeys(failed, "this GPU is old") if world.rank == world.size - 1 else {}

    def use(requests: Any, found: Any, _: Any) -> dict[str, str]:
        return real_use(requests, found, torch.device("cuda"))

    choice.obstacles, choice.use, choice.load = obstacles, use, lambda *_: None  # type: ignore[assignment,return-value]
    names = choose(load_config("tiny", []), world, 128)
    print(f"rank {world.rank}: {names}")
    try:
        choose(load_config("tiny", ["kernels.geglu=triton"]), world, 128)
    except InputError as error:
        print(f"rank {world.rank}: {error}")
    leave(0)
