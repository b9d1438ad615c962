"""What ends a job before its run is finished, done to slurm/pretrain.sbatch under a real Slurm.

The uninterrupted run is one on two ranks under torchrun; whatever happens to a job, its losses are those.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.commands import losses, pretrain
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import GATE_STEP, RUN, Run

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    pretrain("train", *RUN, f"run_dir={run_dir}", f"data.path={tiny_dataset}", ranks=2)
    return losses(run_dir)


@pytest.fixture(scope="module", autouse=True)
def limited(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Run, str]]:
    """Two jobs with a minute, Slurm's shortest limit; submitted first, so that the other tests need not wait for it."""
    jobs = {}
    for name, env in (("hears", {}), ("hangs", {"GATE_DEAF": "1"})):
        run = Run(cluster, tmp_path_factory.mktemp(name), tiny_dataset, gated=True)
        jobs[name] = run, run.submit(["--time=1", "--signal=USR1@1"], **env)
    return jobs


def test_scancel_leaves_a_committed_checkpoint_and_the_job_stays_cancelled(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path, tiny_dataset, gated=True)
    job = run.submit([])
    run.wait_at_gate(job)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED", cluster.log(job)
    assert run.read("exit.json")["status"] == 75
    # Told to stop in step 6, the ranks finished it and saved.
    assert run.read("exit.json")["checkpoint_step"] == GATE_STEP
    manifest = json.loads((run.dir / "checkpoints" / f"step-{GATE_STEP:09d}" / "MANIFEST.json").read_text())
    assert manifest["world_size"] == 2
    assert cluster.job(job)["Restarts"] == "0", cluster.log(job)


def test_a_hung_job_ends_and_is_queued_again_but_not_for_ever(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path, uninterrupted: list[float]
) -> None:
    limits = ["data.stall_seconds=3", "watchdog.step_seconds=4"]
    run = Run(cluster, tmp_path / "again", tiny_dataset, gated=True)
    job = run.submit([], *limits, GATE_DEAF="1")
    hopeless = Run(cluster, tmp_path / "hopeless", tiny_dataset, gated=True)
    stays = hopeless.submit(["--nodes=1"], *limits, GATE_DEAF="1", MAX_FRUITLESS="1")

    run.wait_for_restart(job)
    run.gate.unlink()
    log = run.finish(job)
    assert "start 1: status 70 at checkpoint 3" in log
    assert run.losses() == uninterrupted

    ended = cluster.wait(stays)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "70:0", "0"), cluster.log(stays)
    assert "MAX_FRUITLESS" in cluster.log(stays)


def test_a_run_into_the_time_limit_goes_on_as_if_nothing_had_happened(
    cluster: SlurmCluster, limited: dict[str, tuple[Run, str]], uninterrupted: list[float]
) -> None:
    run, job = limited["hears"]
    run.wait_for_restart(job)
    run.gate.unlink()
    log = run.finish(job)
    assert "SIGUSR1" in log
    assert run.lives() == [(2, 0), (2, GATE_STEP)], log
    assert run.losses() == uninterrupted


def test_a_run_that_hangs_at_the_time_limit_is_queued_again_too(
    limited: dict[str, tuple[Run, str]], uninterrupted: list[float]
) -> None:
    run, job = limited["hangs"]
    run.wait_until(job, lambda: len(run.lives()) == 2, "its second life")
    run.gate.unlink()
    log = run.finish(job)
    assert "DUE TO TIME LIMIT" in log
    assert run.lives() == [(2, 0), (2, 3)], log
    assert run.losses() == uninterrupted


def test_a_job_that_is_preempted_goes_on_afterwards(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path, uninterrupted: list[float]
) -> None:
    run = Run(cluster, tmp_path, tiny_dataset, gated=True)
    job = run.submit(["--exclusive", "--cpus-per-task=1"])  # as many threads as the uninterrupted run has
    run.wait_at_gate(job)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    run.wait_for_restart(job)
    run.gate.unlink()
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    log = run.finish(job)
    assert "SIGTERM" in log  # not killed: it had half a minute to save, and used it
    assert run.lives() == [(2, 0), (2, GATE_STEP)], log
    assert run.losses() == uninterrupted


def test_a_job_goes_on_without_a_node_that_has_died(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path, uninterrupted: list[float]
) -> None:
    run = Run(cluster, tmp_path, tiny_dataset, gated=True)
    job = run.submit(["--nodes=1-2"], RANKS_WAIT="2")
    run.wait_at_gate(job)
    cluster.kill_node("node2")
    run.gate.unlink()
    run.wait_for_restart(job)
    cluster.start_node("node2")  # Slurm waits for it, to know that nothing of the job is left there
    log = run.finish(job)
    assert "status 70" in log
    assert "queued again, without node2" in log
    assert run.lives() == [(2, 0), (1, 3)], log
    assert cluster.job(job)["NodeList"] == "node1"  # though node2 is back
    assert run.losses() == pytest.approx(uninterrupted, rel=1e-5)


def test_a_node_on_which_python_does_not_start_is_left_out_by_the_checks(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path, tiny_dataset, gated=False)
    python = tmp_path / "python on node1 only"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = node2 ] && exit 127\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    job = run.submit(["--nodes=1-2"], PYTHON=str(python), PREFLIGHT="1", RANKS_WAIT="30")
    log = run.finish(job)
    assert "MISS  ranks  did not come within 15 s: node2" in log
    assert "queued again, without node2" in log
    assert run.lives() == [(1, 0)], log
