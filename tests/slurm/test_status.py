"""`python -m slurm status`, on run directories as training leaves them, and under a real Slurm."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.cli import InputError
from pretrain.lease import Lease
from pretrain.lives import record_life
from slurm.preflight import disk
from slurm.preflight.check import MISS, OK, WARN, Check
from slurm.status import status
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]


def make_run(path: Path, last_step: int, saved: int, max_steps: int = 10_000) -> Path:
    """A line a step up to `last_step`, 1 s each; as much as is tailed and more."""
    (path / "checkpoints" / f"step-{saved:09d}").mkdir(parents=True)
    (path / "checkpoints" / f"step-{saved:09d}" / "MANIFEST.json").write_text("{}")
    (path / "config.yaml").write_text(yaml.safe_dump({"train": {"max_steps": max_steps, "stop_at_step": None}}))
    speed = {"tokens_per_second": 1000.0, "step_seconds_p50": 1.0}
    with (path / "metrics.jsonl").open("w") as stream:
        for step in range(1, last_step + 1):
            slow = {"tokens_per_second": 1.0} if step % 5 == 0 else {}  # a median isn't moved by what validation costs
            stream.write(json.dumps({"step": step, "loss": 8 - step / 1000, **speed, **slow}) + "\n")
        stream.write('{"step": 99')  # killed while it wrote
    return path


def write_exit(run_dir: Path, number: int, reason: str) -> None:
    (run_dir / "exit.json").write_text(json.dumps({"status": number, "reason": reason, "checkpoint_step": None}))


def write_checks(run_dir: Path, number: int, *checks: Check, bad_nodes: tuple[str, ...] = (), at: str = "9999") -> None:
    rows = [check.row() for check in (Check("python", "versions", OK, "fine"), *checks)]
    record = {"status": number, "verdict": MISS, "job": None, "time": at, "checks": rows, "bad_nodes": bad_nodes}
    (run_dir / "preflight.json").write_text(json.dumps(record))


def set_job(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)


def without_slurm(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setenv("PATH", str(empty))


def test_a_run_without_slurm_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch, tmp_path)
    run_dir = make_run(tmp_path / "run", last_step=2345, saved=2300)
    (run_dir / "checkpoints" / "step-000002400").mkdir()  # no manifest
    (run_dir / "checkpoints" / "step-000002500.tmp-life").mkdir()
    set_job(monkeypatch, "7")
    record_life(run_dir, "first", 8, 0)
    write_exit(run_dir, 75, "SIGUSR1: step 2300 is saved")

    found = status(run_dir)
    assert (found["step"], found["last_step"], found["loss"]) == (2345, 10_000, pytest.approx(5.655))
    assert (found["tokens_per_second"], found["mfu"], found["checkpoint"]["step"]) == (1000.0, None, 2300)
    assert found["seconds_left"] == 7700 and found["more_lives"] is None  # what was not saved is done again
    assert found["job"]["state"] is None and "no Slurm here" in found["job"]["problem"]
    assert found["state"] == "stopped" and "SIGUSR1: step 2300 is saved: submit it again" in found["advice"]


@pytest.mark.parametrize(
    ("number", "state", "advice"),
    [
        (0, "finished", "finished"),
        (2, "failed", "failed, status 2: because: mend that, and submit it again"),
        (70, "failed", "stacks are in hangs/: submit it again"),
        (1, "failed", "failed, status 1: because: find the cause"),
    ],
)
def test_the_exit_status_says_what_to_do(tmp_path: Path, number: int, state: str, advice: str) -> None:
    run_dir = make_run(tmp_path / "run", last_step=3, saved=3, max_steps=3)
    write_exit(run_dir, number, "because")
    found = status(run_dir)
    assert found["state"] == state and advice in found["advice"]


def test_a_life_that_runs_is_told_from_one_that_starts_is_silent_or_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_slurm(monkeypatch, tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run_dir = make_run(tmp_path / "run", last_step=50, saved=50)
    lease = Lease.take(run_dir, "life")
    try:
        record_life(run_dir, "life", 1, 50)
        assert status(run_dir)["state"] == "running"
        long_ago = time.time() - 720
        os.utime(run_dir / "metrics.jsonl", (long_ago, long_ago))
        found = status(run_dir)
        assert found["state"] == "silent" and found["silent"] and "silent for 12 min" in found["advice"]
        left = json.loads((run_dir / "lease.json").read_text())
        (run_dir / "lease.json").write_text(json.dumps(left | {"pid_start": 1}))  # another process has this number now
        assert status(run_dir)["state"] == "dead"
        (run_dir / "lease.json").write_text(json.dumps(left | {"host": "elsewhere"}))
        assert status(run_dir)["state"] == "unknown"
    finally:
        lease.release()


def test_a_copy_of_a_run_that_lives_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch, tmp_path)
    run_dir = make_run(tmp_path / "run", last_step=50, saved=50)
    lease = Lease.take(run_dir, "life")
    try:
        shutil.copytree(run_dir, tmp_path / "copy")
        assert (status(run_dir)["state"], status(tmp_path / "copy")["state"]) == ("running", "dead")
    finally:
        lease.release()


def test_a_start_that_the_checks_refused_says_what_was_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch, tmp_path)
    run_dir = make_run(tmp_path / "run", last_step=50, saved=50)
    record_life(run_dir, "life", 1, 50)
    warning = Check("gpu", "ECC", WARN, "not known", "look")
    dataset = Check("dataset", "path", MISS, "/gone: not found", "mount it")
    node = Check("nodes", "roll call", MISS, "node7 did not come", "look at it", again=True)
    write_checks(run_dir, 2, warning, dataset, node)
    found = status(run_dir)
    assert found["state"] == "refused" and [row["name"] for row in found["preflight"]["missed"]] == ["path", "roll call"]
    assert "status 2: dataset, path: /gone: not found; mount it (and 1 more MISS" in found["advice"]
    assert found["advice"].endswith(": then submit it again")

    write_checks(run_dir, 70, node, bad_nodes=("node7", "node9"))
    advice = status(run_dir)["advice"]
    assert "node7 did not come" in advice and "its job comes back by itself, without node7,node9; else submit it" in advice

    write_checks(run_dir, 0, warning)
    assert status(run_dir)["state"] == "dead"
    write_checks(run_dir, 2, dataset, at="2026-01-01T00:00:00Z")  # of a start before that life
    assert status(run_dir)["state"] == "dead"
    write_checks(run_dir, 2, dataset)
    write_exit(run_dir, 75, "SIGUSR1")
    assert status(run_dir)["state"] == "stopped"


def test_a_run_directory_is_known_before_its_first_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch, tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert (status(run_dir)["state"], status(run_dir)["step"]) == ("new", None)
    _, token = tempfile.mkstemp(dir=run_dir, prefix=disk.TOKEN)
    (run_dir / "pretrain-7.out").touch()
    assert status(run_dir)["state"] == "checking"
    os.utime(token, (0, 0))  # of a rank that was killed
    found = status(run_dir)
    assert found["state"] == "new" and "no life has begun to train; if its job has run" in found["advice"]
    write_checks(run_dir, 2, Check("dataset", "path", MISS, "/gone: not found", "mount it"))
    assert status(run_dir)["state"] == "refused"


def test_files_with_wrong_values_are_named_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch, tmp_path)
    run_dir = make_run(tmp_path / "run", last_step=50, saved=50)
    lives = [{"from_step": 3}, {"from_step": "3"}, {"from_step": 3, "restart": "first"}, [3], 3]
    (run_dir / "lives.jsonl").write_text("".join(f"{json.dumps(life)}\n" for life in lives))
    records = [{"step": "51"}, {"step": 51, "loss": "nan"}, {"step": 51, "step_seconds_p50": [1]}, [51], 51]
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write("\n" + "".join(f"{json.dumps(record)}\n" for record in records))
    for name in ("exit.json", "preflight.json"):
        (run_dir / name).write_text('[{"status": 2}]')
    (run_dir / "lease.json").write_text('{"host": "x", "job": 5}')

    done = subprocess.run([sys.executable, "-m", "slurm", "status", run_dir, "--json"], cwd=ROOT, capture_output=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and (found["step"], found["lives"], found["life"]["job"]) == (50, 1, None)
    assert found["state"] == "unknown" and "may be running on host x" in found["advice"]

    for steps in ("abc", "[1]", "{}", "", ".inf"):
        (run_dir / "config.yaml").write_text(f"train: {{max_steps: {steps}}}")
        with pytest.raises(InputError, match=r"config\.yaml: not the configuration of a run"):
            status(run_dir)


def test_lives_that_get_nowhere_are_counted(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", last_step=120, saved=100)
    for number, step in enumerate([0, 100, 100, 100]):
        record_life(run_dir, f"life {number}", 1, step)
    found = status(run_dir)
    assert (found["lives"], found["lives_without_progress"], found["state"]) == (4, 3, "dead")
    assert "the last 3 lives began at step 100: read their output" in found["advice"]


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        status(tmp_path / "missing")
    (tmp_path / "genomes").mkdir()
    with pytest.raises(InputError, match="not a run directory"):
        status(tmp_path)


def test_status_and_clean_start_without_torch() -> None:
    code = "import sys, slurm.status, slurm.clean; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slurm
def test_a_job_is_followed_from_running_to_the_queue_to_its_end(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path / "run", last_step=4000, saved=4000)

    def look() -> dict[str, Any]:
        done = cluster.run(
            sys.executable, "-m", "slurm", "status", str(run_dir), "--json", PYTHONPATH=str(ROOT), check=False
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def wait_for(state: str, advice: str = "") -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while (found := look())["state"] != state or advice not in found["advice"]:
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found

    job = cluster.submit("--time=60", "--job-name=x JobState=FAILED", "--wrap", "sleep 300")
    set_job(monkeypatch, job)
    lease = Lease.take(run_dir, "life")  # of a host that the commands take for another one
    lease.release()
    record_life(run_dir, "life", 1, 3000)
    assert wait_for("starting")["job"]["state"] == "RUNNING"

    lease = Lease.take(run_dir, "life")
    try:
        found = wait_for("running")
        assert found["job"]["id"] == job and found["job"]["nodes"] and found["job"]["restarts"] == 0
        assert found["job"]["time_limit_seconds"] == 3600 and 3500 < found["job"]["time_left_seconds"] <= 3600
        assert found["seconds_left"] == 6000 and found["more_lives"] == 1  # of an hour each
    finally:
        lease.release()

    cluster.run("scontrol", "requeuehold", job)
    assert f"scontrol release {job}" in wait_for("held")["advice"]
    cluster.run("scontrol", "release", job)
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now+1hour")
    found = wait_for("waiting", "waiting in the queue: BeginTime")
    assert found["job"]["restarts"] == 1

    cluster.run("scancel", job)
    found = wait_for("dead")
    assert found["job"]["state"] == "CANCELLED" and f"(job {job}: CANCELLED): submit it again" in found["advice"]
