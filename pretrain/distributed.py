"""Who this process is among the ranks of a run, whoever started it: nobody, torchrun, `deepspeed` or `srun`."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from data_prep.cli import InputError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Element-wise sum over all ranks, in fp64; a collective, so every rank calls it with as many values."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: float) -> float:
        """The largest value of all ranks; a collective."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def barrier(self) -> None:
        # An all-reduce rather than dist.barrier(): NCCL's barrier guesses a device when none is bound to the group.
        self.sum(0.0)

    def share(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        return int(self.sum(value if self.is_first else 0)[0])


def environment_rank() -> int:
    """This process's rank as its launcher states it, before anything is initialised; 0 when started alone."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _is_srun_task() else 0


def _is_srun_task() -> bool:
    # The batch script of a job has SLURM_PROCID too; only what srun starts has a step with a number of tasks.
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def start() -> World:
    """Join the other ranks: NCCL where there are GPUs, gloo otherwise.

    Raises InputError when a node starts more ranks than it has GPUs.
    """
    if "RANK" not in os.environ and _is_srun_task():
        _adopt_srun()
    rendezvous: dict[str, Any] = {}
    if "RANK" not in os.environ:  # alone: no port to open, nobody to meet
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        rendezvous = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        index = 0 if visible == 1 and _is_srun_task() else local_rank  # srun can show each task its own GPU only
        if index >= visible:
            raise InputError(f"rank {rank}: local rank {local_rank} has no GPU, there are {visible}; start fewer ranks")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **rendezvous)
    return World(rank, size, device)


def _adopt_srun() -> None:
    """Translate srun's variables into those that torch reads."""
    slurm = os.environ
    if "MASTER_ADDR" not in slurm:
        command = ["scontrol", "show", "hostnames", slurm["SLURM_STEP_NODELIST"]]
        slurm["MASTER_ADDR"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    slurm.setdefault("MASTER_PORT", str(20_000 + int(slurm["SLURM_JOB_ID"]) % 20_000))
    slurm["RANK"], slurm["WORLD_SIZE"] = slurm["SLURM_PROCID"], slurm["SLURM_STEP_NUM_TASKS"]
    slurm["LOCAL_RANK"] = slurm["SLURM_LOCALID"]


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 (what Slurm sends before it ends a job), so that the loop can finish its step."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
