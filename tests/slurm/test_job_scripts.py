"""slurm/pretrain.sbatch under a real Slurm, with the real commands."""

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slurm


def submit(cluster: SlurmCluster, config: str, run_dir: Path, *overrides: str) -> str:
    """Two ranks on the one node; the options are those that the script's header tells operators to edit."""
    options = ["--ntasks=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--chdir={ROOT}"]
    script = str(ROOT / "slurm" / "pretrain.sbatch")
    return cluster.submit(*options, script, config, *overrides, RUN_DIR=str(run_dir), PYTHON=sys.executable)


def test_two_ranks_finish_and_a_second_submission_changes_nothing(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run of mine"  # a space: everything in the script is quoted
    numbers = ["train.max_steps=4", "train.log_every=1", "checkpoint.save_every=2", "validation.every=0"]
    overrides = [f"data.path={tiny_dataset}", *numbers]

    job = submit(cluster, "pretrain/configs/tiny.yaml", run_dir, *overrides)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert json.loads((run_dir / "exit.json").read_text())["status"] == 0
    metrics = (run_dir / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [1, 2, 3, 4]
    manifests = sorted((run_dir / "checkpoints").glob("step-*/MANIFEST.json"))
    assert [json.loads(m.read_text())["world_size"] for m in manifests] == [2, 2], cluster.log(job)

    again = submit(cluster, "pretrain/configs/tiny.yaml", run_dir, *overrides)
    assert cluster.wait(again)["JobState"] == "COMPLETED", cluster.log(again)
    assert json.loads((run_dir / "exit.json").read_text())["status"] == 0
    assert (run_dir / "metrics.jsonl").read_text() == metrics


def test_bad_input_fails_the_job_with_its_status_and_is_not_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, "no-such-config.yaml", tmp_path / "run")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), cluster.log(job)
    assert "no-such-config.yaml" in cluster.log(job)
