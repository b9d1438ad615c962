"""What the system says about memory, as control groups of both versions and their absence write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.tokenizing.memory import available_memory, peak_memory


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_peak_grows_with_what_is_used() -> None:
    before = peak_memory()
    assert before > 10_000_000
    assert np.ones(before // 8 + 50_000_000 // 8).sum() > 0  # more than there ever was
    assert peak_memory() >= before + 40_000_000


def test_the_least_of_machine_and_job_counts(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    machine = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:   1000 kB\n", "proc/self/cgroup": "0::/\n"}
    assert available_memory(write(tmp_path, machine)) == 1_024_000
    second = {"proc/self/cgroup": "0::/slurm/job_7/step_0\n", "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n"}
    assert available_memory(write(tmp_path, second)) == 1_024_000
    assert available_memory(write(tmp_path, {"sys/fs/cgroup/slurm/job_7/memory.max": "500\n"})) == 500
    first = {
        "proc/self/cgroup": "4:cpu:/slurm/a\n3:memory:/slurm/a\n",
        "sys/fs/cgroup/memory/slurm/a/memory.limit_in_bytes": "400\n",
    }
    assert available_memory(write(tmp_path, first)) == 400
