"""Several processes do what one does, and none outlives the command."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_prep.processes import cores, run_in_processes
from tests.data_prep.test_removal import tree


def test_results_and_errors() -> None:
    assert sorted(run_in_processes(operator.add, [(number, 1) for number in range(5)], 2)) == [1, 2, 3, 4, 5]
    assert list(run_in_processes(operator.add, [], 2)) == []
    with pytest.raises(ZeroDivisionError):
        list(run_in_processes(operator.truediv, [(1, 1), (1, 0), (1, 2)], 2))


def test_cores_are_no_more_than_slurm_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "9999")
    assert cores() == bound
    for odd in ("", "0", "-2", "two", "4(x2)"):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", odd)
        assert cores() == bound


def test_more_processes_make_the_same_bytes(dataset: Path, shard: Callable[..., int], tmp_path: Path) -> None:
    assert shard(tmp_path / "two", "--processes", "2") == 0
    assert tree(tmp_path / "two") == tree(dataset)
    assert shard(tmp_path / "none", "--processes", "0") == 2


def test_a_killed_command_leaves_no_workers() -> None:
    code = (
        "import time; from data_prep.processes import run_in_processes; list(run_in_processes(time.sleep, [(60,)] * 2, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(workers := psutil.Process(parent.pid).children(recursive=True)) < 3:  # two, and the resource tracker
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # they import what they need
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
