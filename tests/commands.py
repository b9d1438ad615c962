"""Runs the project's commands as a user would: in processes of their own, from the root of the repository."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# One thread a rank: the machine has two cores, and more threads than cores stall each other.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def python(*arguments: str | Path, ranks: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, or the same under torchrun with `ranks` processes."""
    command: list[str] = [sys.executable, *map(str, arguments)]
    if ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
        command[1:1] = launcher
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def pretrain(*arguments: str | Path, ranks: int = 0, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `python -m pretrain ARGUMENTS` and check its exit status (torchrun makes 1 of any other than 0)."""
    done = python("-m", "pretrain", *arguments, ranks=ranks)
    assert done.returncode == status, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What `--json` printed on the last line of stdout."""
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir)]


def exit_status(run_dir: Path) -> int:
    return int(json.loads((run_dir / "exit.json").read_text())["status"])
