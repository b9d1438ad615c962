"""What tests of the job scripts share: a small run, jobs that can be held at a step, and what they leave behind."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.commands import ROOT
from tests.slurm.cluster import LIVE_STATES, SlurmCluster, wait_until

GATE_STEP = 6
RUN = [
    "tiny",
    "train.max_steps=9",
    "train.global_batch_size=11",
    "train.micro_batch_size=3",
    "train.log_every=1",
    "optimizer.warmup_steps=2",
    "validation.every=0",
    "checkpoint.save_every=3",
]


class Run:
    """A run directory, and a gate before update GATE_STEP, closed from the start where `gated`."""

    def __init__(self, cluster: SlurmCluster, folder: Path, dataset: Path, *, gated: bool) -> None:
        self.cluster, self.dir, self.dataset = cluster, folder / "run of mine", dataset  # a space: scripts quote
        folder.mkdir(exist_ok=True)
        self.gate = folder / "gate"
        if gated:
            self.gate.touch()

    def submit(self, options: list[str], *overrides: str, **env: str) -> str:
        """Two nodes, a rank each, unless `options` say something else."""
        usual = {"RUN_DIR": str(self.dir), "DATASET": str(self.dataset), "RANKS_PER_NODE": "1", "PREFLIGHT": "0"}
        usual |= {"GATE": str(self.gate), "GATE_STEP": str(GATE_STEP), "PYTHON": gated_python(self.gate.parent)}
        options = [f"--chdir={ROOT}", "--nodes=2", "--mincpus=1", "--oversubscribe", *options]
        return self.cluster.submit(*options, str(ROOT / "slurm" / "pretrain.sbatch"), *RUN, *overrides, **(usual | env))

    def wait_at_gate(self, job: str) -> None:
        """Until step 3 is committed and the step before the gate is logged."""
        done = self.dir / "checkpoints" / "step-000000003" / "MANIFEST.json"
        self.wait_until(job, lambda: done.exists() and self.steps()[-1:] == [GATE_STEP - 1], "the run to be at the gate")

    def wait_for_restart(self, job: str) -> None:
        self.wait_until(job, lambda: self.cluster.job(job)["Restarts"] == "1", "the job to be queued again")

    def wait_until(self, job: str, condition: Callable[[], bool], what: str) -> None:
        """Not longer than the job lives."""

        def met() -> bool:
            live = self.cluster.job(job)["JobState"] in LIVE_STATES
            assert condition() or live, f"the job ended before {what}\n{self.cluster.log(job)}"
            return condition()

        wait_until(met, 120, what, lambda: self.cluster.log(job))

    def finish(self, job: str) -> str:
        """Wait for the job, which must end well; its log."""
        assert self.cluster.wait(job)["JobState"] == "COMPLETED", self.cluster.log(job)
        assert self.read("exit.json")["status"] == 0
        return self.cluster.log(job)

    def metrics(self) -> list[dict[str, Any]]:
        return self.lines("metrics.jsonl")

    def steps(self) -> list[int]:
        return [record["step"] for record in self.metrics()]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.metrics()]

    def lives(self) -> list[tuple[int, int]]:
        """Ranks of each life, and the step that it went on from."""
        return [(life["ranks"], life["from_step"]) for life in self.lines("lives.jsonl")]

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.dir / name).read_text())


def gated_python(folder: Path) -> str:
    """A program that runs gated.py as if it were Python itself."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(Path(__file__).with_name("gated.py"))])} "$@"\n')
    path.chmod(0o755)
    return str(path)
