"""Runs calls of one function in several processes, each on one core."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where Slurm says so (it need not bind them)."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(bound, int(given)) if given.isdecimal() and int(given) else bound


def run_in_processes(function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Result]:
    """Yield `function(*call)` for each of `calls`, in the order in which they end. The first error ends all."""
    # Spawned, not forked: a fork would inherit the threads' locks of `tokenizers`.
    pool = ProcessPoolExecutor(min(processes, len(calls)) or 1, get_context("spawn"), _prepare, (os.getpid(),))
    try:
        for future in as_completed([pool.submit(function, *call) for call in calls]):
            yield future.result()
    except BaseException:
        for worker in active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(parent: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # threads of `tokenizers`: there are as many processes as cores
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they may be sent to all; the parent ends the others
    if sys.platform == "linux":  # a killed parent must not leave workers that wait for it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
