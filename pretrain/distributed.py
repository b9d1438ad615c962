"""Who this process is among the ranks of a run, whoever started it: nobody, torchrun, `deepspeed` or `srun`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from data_prep.cli import BAD_INPUT, HUNG, Hung, InputError, exit_status, one_line

FAILURE_SECONDS = 5.0  # how long a rank whose collective broke waits for the one that left to have said why


class RankLost(Hung):
    """A collective broke, and the rank that is missing has not said why."""


@dataclass(frozen=True)
class World:
    """The ranks of a run. `store` holds small values that all of them see, without taking part at the same time.

    Numbers of the host are summed by gloo, over `control`: NCCL would sum them on the GPU, behind all work that waits there,
    and the host would stand still until that is done. None: the group of all ranks, which is gloo's where there is no GPU.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Element-wise sum over all ranks, in fp64; a collective, so every rank calls it with as many values."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max(self, value: float) -> float:
        """The largest value of all ranks; a collective."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return float(largest)

    def barrier(self) -> None:
        """Of the hosts: a GPU may still be at work when it returns."""
        self.sum(0.0)

    def gather(self, value: float) -> list[float]:
        """The values of all ranks, by rank; a collective."""
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.size)))

    def agree(self, failure: Exception | None, *values: float) -> list[float]:
        """Sums of `values` over all ranks, if none of them failed. Raises this rank's `failure`, or one of its kind.

        So ranks leave together and with the same status, and none waits for one that has left. A collective.
        """
        mine = None if failure is None else exit_status(failure)
        *sums, failed, hung, bad_input = self.sum(*values, mine is not None, mine == HUNG, mine == BAD_INPUT)
        if failed == 0:
            return sums
        if failure is not None:
            self.report_failure(failure)
        rank = int(self.max(-1 if failure is None else self.rank))
        kind = Hung if hung else InputError if bad_input else RuntimeError
        raise failure or kind(self.reported_failure().partition(" ")[2] or f"rank {rank} failed; see its message in the log")

    def limit_collectives(self, seconds: float) -> None:
        """From now on a collective that takes longer fails. The watchdog comes first; this is for when it can't."""
        for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed's collectives are in groups of its own
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def report_failure(self, error: BaseException) -> None:
        """Tell the ranks that will soon miss this one why it leaves. The first to fail has the word."""
        with suppress(Exception):  # the store may be gone: it lives in another process
            if not self.reported_failure():
                text = f"rank {self.rank}: {one_line(error) or type(error).__name__}"
                self.store.set("failure", f"{exit_status(error)} {text}")

    def explain(self, error: BaseException) -> BaseException:
        """What stands behind a failure: for a broken collective, the failure of the rank that left, or that it was lost."""
        if not _is_broken_collective(error):
            self.report_failure(error)
            return error
        deadline = time.monotonic() + FAILURE_SECONDS
        while time.monotonic() < deadline:
            if reported := self.reported_failure():
                return failure_of(reported)
            time.sleep(0.2)
        return RankLost(f"lost a rank: {one_line(error)}")

    def reported_failure(self) -> str:
        """What the rank that failed first has said: status, rank and reason; "" where none did."""
        with suppress(Exception):
            if self.store.check(["failure"]):
                return self.store.get("failure").decode()
        return ""


def failure_of(reported: str) -> Exception:
    """The failure that another rank has reported, as an exception of its kind."""
    status, _, text = reported.partition(" ")
    return {BAD_INPUT: InputError, HUNG: Hung}.get(int(status), RuntimeError)(text)


def _is_broken_collective(error: BaseException) -> bool:
    """gloo and torch raise RuntimeErrors of several kinds; there is no common class."""
    words = ("gloo", "connection closed by peer", "connection reset by peer", "nccl", "timed out", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def environment_rank() -> int:
    """This process's rank as its launcher states it, before anything is initialised; 0 when started alone."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if is_srun_task() else 0


def is_srun_task() -> bool:
    # The batch script of a job has SLURM_PROCID too; only what srun starts has a step with a number of tasks.
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def start(timeout_seconds: float = 1800.0) -> World:
    """Join the other ranks: NCCL where there are GPUs, and gloo for numbers of the host.

    Args:
        timeout_seconds: for the ranks to come together, and for each collective until `World.limit_collectives`.

    Raises InputError when a node starts more ranks than it has GPUs, Hung when the ranks don't come together.
    """
    if "RANK" not in os.environ and is_srun_task():
        adopt_srun()
    alone = "RANK" not in os.environ  # no port to open, nobody to meet
    if alone:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        index = 0 if visible == 1 and is_srun_task() else local_rank  # srun can show each task its own GPU only
        if index >= visible:
            raise InputError(f"rank {rank}: local rank {local_rank} has no GPU, there are {visible}; start fewer ranks")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = dist.HashStore() if alone else next(rendezvous("env://", rank, size, timeout=timeout))[0]
        store.set_timeout(timeout)
        joined = dist.PrefixStore("group", store)
        dist.init_process_group(backend, timeout=timeout, store=joined, rank=rank, world_size=size)
        control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    except dist.DistError as error:
        raise Hung(f"rank {rank}: the {size} ranks did not come together: {one_line(error)}") from error
    return World(rank, size, device, dist.PrefixStore("run", store), control)


def adopt_srun() -> None:
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
