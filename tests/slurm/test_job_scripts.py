"""The job scripts under a real Slurm, with the real commands: what they run, what they try again and what they don't."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ROOT, python
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import Run, gated_python

pytestmark = pytest.mark.slurm


def test_a_run_on_two_nodes_is_finished_on_one_with_checks_a_local_copy_and_an_export(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    run, exported = Run(cluster, tmp_path, tiny_dataset, gated=False), tmp_path / "hugging face"
    run.finish(run.submit([], "train.stop_at_step=4"))
    assert run.lives() == [(2, 0)]

    log = run.finish(
        run.submit(["--nodes=1"], EXPORT=str(exported), PREFLIGHT="1", COPY_DATASET="1", LOCAL_SCRATCH=str(tmp_path))
    )
    assert run.lives() == [(2, 0), (1, 4)], log
    assert run.steps() == list(range(1, 10))
    assert run.read("preflight.json")["verdict"] in ("OK", "WARN"), log
    assert (exported / "model.safetensors").is_file(), log
    assert f"copying {tiny_dataset} to {tmp_path}/dnabert2-" in log
    assert not list(tmp_path.glob("dnabert2-*"))  # what a job has on its nodes' disks goes with it

    before = run.metrics()
    run.finish(run.submit([]))
    assert run.metrics() == before


def test_bad_input_fails_the_job_with_its_status_and_is_not_requeued(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path, tiny_dataset, gated=False)
    job = run.submit(["--nodes=1"], "model.hidden_size=no-number")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), cluster.log(job)
    assert "hidden_size" in cluster.log(job)


def test_an_array_task_that_is_killed_is_tried_again_and_the_dataset_is_the_same(
    cluster: SlurmCluster, synthetic: Path, tiny_tokenizer: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset, trap = tmp_path / "dataset", tmp_path / "trap"
    trap.touch()  # the first of the tasks to complete a unit is killed
    env = {"PYTHON": gated_python(tmp_path), "FAIL_ONCE": str(trap)}
    script = [f"--chdir={ROOT}", "--cpus-per-task=1", "--mem=0", str(ROOT / "slurm" / "data_prep.sbatch")]
    small = ["--region-bases", "5000", "--unit-bases", "50000", "--valid-fraction", "0.1", "--streams", "8"]
    genomes = ["--genomes", str(synthetic / "genomes"), "--tokenizer", str(tiny_tokenizer)]
    array = cluster.submit("--array=0-2", *script, "shard", *genomes, "--out", str(dataset), *small, **env)
    finalize = cluster.submit(f"--dependency=afterok:{array}", *script, "finalize", str(dataset), **env)

    log = cluster.log(finalize) if cluster.wait(finalize)["JobState"] == "COMPLETED" else pytest.fail(cluster.log(finalize))
    assert not trap.exists(), log
    restarts = [cluster.job(f"{array}_{task}")["Restarts"] for task in range(3)]
    assert sorted(restarts) == ["0", "0", "1"]
    same = [path.relative_to(tiny_dataset) for path in tiny_dataset.rglob("*") if path.is_file()]
    for name in same:
        assert (dataset / name).read_bytes() == (tiny_dataset / name).read_bytes(), name


def test_an_array_that_would_leave_work_out_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = [f"--chdir={ROOT}", "--mem=0", str(ROOT / "slurm" / "data_prep.sbatch"), "shard", "--out", str(tmp_path)]
    job = cluster.submit("--array=1-2", "--output=/dev/null", *script)
    cluster.wait(f"{job}_1")
    assert (cluster.job(f"{job}_1")["JobState"], cluster.job(f"{job}_1")["ExitCode"]) == ("FAILED", "2:0")


def test_outcome_takes_the_word_of_the_run_before_that_of_the_checks_and_that_before_srun(tmp_path: Path) -> None:
    def outcome(srun: int) -> list[str]:
        done = python("-m", "slurm", "outcome", tmp_path, "--srun", str(srun))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert outcome(0) == ["70", "0"]  # srun says 0 where it gave up on a node; a run that is done has written exit.json
    assert outcome(128 + 10)[0] == "75"
    assert outcome(1)[0] == "1"
    (tmp_path / "preflight.json").write_text('{"status": 70, "bad_nodes": ["node7", "node9"]}')
    assert outcome(127) == ["70", "0", "node7,node9"]  # that of a node without Python
    (tmp_path / "checkpoints" / "step-000000012").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000000012" / "MANIFEST.json").touch()
    (tmp_path / "exit.json").write_text('{"status": 75}')
    assert outcome(0)[:2] == ["75", "12"]
    (tmp_path / "preflight.json").write_text('{"status": 0, "bad_nodes": []}')
    (tmp_path / "exit.json").write_text('{"status": ')  # a dying node
    assert outcome(2) == ["2", "12"]
