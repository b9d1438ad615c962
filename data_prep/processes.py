"""Runs calls of one function in several processes, each on one core."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where Slurm says so (it need not bind them)."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, int(os.environ.get("SLURM_CPUS_PER_TASK", bound)))


def run_in_processes(function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Result]:
    """Yield `function(*call)` for each of `calls`, in the order in which they end. The first error ends all."""
    # Spawned, not forked: a fork would inherit the threads' locks of `tokenizers`.
    pool = ProcessPoolExecutor(min(processes, len(calls)) or 1, get_context("spawn"), _prepare, (os.getpid(),))
    try:
        for future in as_completed([pool.submit(function, *call) for call in calls]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(parent: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # threads of `tokenizers`: there are as many processes as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    if sys.platform == "linux":  # a killed parent must not leave workers that wait for it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
