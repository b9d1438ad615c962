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

    log = run.finish(run.submit(["--nodes=1"], EXPORT=str(exported), PREFLIGHT="1", COPY_DATASET="1", SCRATCH=str(tmp_path)))
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


def test_outcome_takes_the_word_of_the_run_before_that_of_srun(tmp_path: Path) -> None:
    def outcome(srun: int) -> list[str]:
        done = python("-m", "slurm", "outcome", tmp_path, "--srun", str(srun))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert outcome(0)[0] == "70"  # srun says 0 where it gave up on a node; a run that is done would have written exit.json
    assert outcome(128 + 10)[0] == "75"
    assert outcome(1)[0] == "1"
    (tmp_path / "exit.json").write_text('{"status": 75}')
    assert outcome(0)[0] == "75"
    (tmp_path / "exit.json").write_text('{"status": ')  # a dying node
    assert outcome(2)[0] == "2"
    (tmp_path / "preflight.json").write_text('{"bad_nodes": ["node7", "node9"]}')
    assert outcome(70)[2] == "node7,node9"


def test_lives_without_a_checkpoint_are_counted_and_starts_that_came_to_no_life_too(tmp_path: Path, monkeypatch) -> None:
    from slurm.outcome import outcome

    (tmp_path / "lives.jsonl").write_text(
        '{"job": "7", "restart": null, "from_step": 0}\n'
        '{"job": "7", "restart": 1, "from_step": 3}\n'
        '{"job": "7", "restart": 2, "from_step": 3}\n'
    )
    (tmp_path / "checkpoints" / "step-000000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000000003" / "MANIFEST.json").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert outcome(tmp_path, 70)["lives_without_progress"] == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")  # two starts ended in the checks
    assert outcome(tmp_path, 70)["lives_without_progress"] == 4
    (tmp_path / "checkpoints" / "step-000000003").rename(tmp_path / "checkpoints" / "step-000000006")
    assert outcome(tmp_path, 70)["lives_without_progress"] == 2
