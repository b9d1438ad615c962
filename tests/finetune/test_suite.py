"""`python -m finetune gue`: all tasks x seeds, divided, repeated, with one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetune.__main__ import run
from finetune.folders import find_tasks
from finetune.suite import Run, _Worker, plan_runs, results_files

QUICK = ["--max-steps", "2", "--warmup-steps", "1", "--batch-size", "8"]


@pytest.fixture
def benchmark(planted: Path, tmp_path: Path) -> Path:
    """Three tasks in folders of two depths, and a folder without training rows."""
    root = tmp_path / "GUE"
    for name in ("b/1", "a/x", "lone"):
        (root / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = (planted / f"{split}.csv").read_text().splitlines(keepends=True)[:17]
            (root / name / f"{split}.csv").write_text("".join(rows))
    (root / "raw").mkdir()
    (root / "raw" / "notes.csv").write_text("a,b\n")
    return root


def gue(benchmark: Path, out: Path, *more: str) -> int:
    return run(["gue", "--model", "random", "--data", str(benchmark), "--out", str(out), *QUICK, "--json", *more])


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_array_does_each_run_once_and_more_seeds_do_only_what_is_new(benchmark, tmp_path, capsys):
    out = tmp_path / "results"
    done = []
    for task in range(4):  # 3 tasks x 2 seeds: the elements get 2, 2, 1 and 1 runs
        assert gue(benchmark, out, "--seeds", "2", "--num-tasks", "4", "--task", str(task)) == 0
        done += [(result["task"], result["seed"]) for result in last(capsys)["results"]]
    assert sorted(done) == [(task, seed) for task in ("a/x", "b/1", "lone") for seed in (0, 1)]
    files = results_files("random", benchmark, out, seeds=2)
    assert sorted(files) == sorted(out.rglob("*.json"))
    assert json.loads(files[0].read_text())["command"].startswith("python -m finetune gue --model random")

    times = {path: path.stat().st_mtime_ns for path in files}
    assert gue(benchmark, out, "--seeds", "3", "--tasks", "b/1", "a/x") == 0
    result = last(capsys)
    assert (result["runs"], result["already_done"]) == (6, 4)
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_a_run_that_fails_is_named_at_the_end_and_the_others_are_done(benchmark, tmp_path, capsys):
    (benchmark / "a/x" / "dev.csv").write_text("sequence,label\nACGT,7\n")
    assert gue(benchmark, tmp_path / "results", "--seeds", "1") == 2
    err = capsys.readouterr().err
    assert "1 of 3 runs failed, the log says why: a/x random seed 0" in err and "label 7" in err
    assert len(list((tmp_path / "results").rglob("seed-0.json"))) == 2


def test_where_running_again_may_help_the_status_says_so(benchmark, tmp_path, capsys):
    (benchmark / "a/x" / "dev.csv").write_text("sequence,label\nACGT,7\n")
    assert gue(benchmark, tmp_path / "results", "--seeds", "1", "--tasks", "a/x", "lone", "--learning-rate", "1e30") == 1
    err = capsys.readouterr().err
    assert (
        "2 of 2 runs failed, the log says why: a/x random seed 0, lone random seed 0" in err
        and "try a lower --learning-rate" in err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "a/y"], "has no task a/y; it has a/x, b/1, lone"),
        (["--num-tasks", "2"], "--num-tasks and --task go together"),
        (["--num-tasks", "2", "--task", "2"], "--task 2: must be from 0 to --num-tasks - 1 = 1"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--protocol", "strict", "--seeds", "2"], "--seeds 2: the strict protocol has at least 3"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--baselines", "random"], "two of the models are called random"),
        (["--method", "lora", "--lora-rank", "0"], "--lora-rank 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(benchmark, tmp_path, capsys, more, message):
    assert gue(benchmark, tmp_path / "results", *more) == 2
    assert message in capsys.readouterr().err


def test_tasks_are_found_below_any_folder(benchmark, tmp_path):
    assert list(find_tasks(benchmark)) == ["a/x", "b/1", "lone"]
    assert list(find_tasks(benchmark / "b" / "1")) == ["b/1"]
    with pytest.raises(Exception, match="no folder with"):
        find_tasks(benchmark / "raw")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_baselines_stand_beside_the_model_and_fits_without_a_seed_are_done_once(benchmark, tmp_path, capfd, processes):
    out, capsys = tmp_path / "results", capfd
    more = ["--seeds", "2", "--tasks", "lone", "a/x", "--processes", processes, "--eval-every", "1"]
    assert gue(benchmark, out, *more, "--baselines", "kmer", "cnn", "--learning-rate", "1e-4") == 0
    printed, err = capfd.readouterr()
    result = json.loads(printed.splitlines()[-1])
    assert (result["runs"], result["already_done"]) == (10, 0)
    assert ("\nlone cnn 1 | step 2/2: train loss" in err) == (processes == "2")
    files = {path.relative_to(out).as_posix(): json.loads(path.read_text()) for path in out.rglob("seed-?.json")}
    labels = [f"random/seed-{seed}" for seed in (0, 1)] + ["kmer-logistic/seed-0"] + [f"cnn/seed-{seed}" for seed in (0, 1)]
    assert sorted(files) == sorted(f"{task}/{label}.json" for task in ("a__x", "lone") for label in labels)
    assert files["lone/cnn/seed-0.json"]["settings"]["learning_rate"] == 1e-3  # the flag is the encoder's
    assert files["lone/random/seed-0.json"]["settings"]["learning_rate"] == 1e-4
    assert [
        entry["deterministic"] for entry in map(files.get, ("lone/kmer-logistic/seed-0.json", "lone/cnn/seed-0.json"))
    ] == [
        True,
        False,
    ]
    assert gue(benchmark, out, *more, "--baselines", "kmer", "cnn", "--learning-rate", "1e-4") == 0
    assert last(capsys)["already_done"] == 10


def test_random_beside_a_checkpoint_has_its_shape(benchmark, huggingface, tmp_path, capsys):
    command = [
        "gue",
        "--model",
        str(huggingface),
        "--data",
        str(benchmark),
        "--out",
        str(tmp_path),
        *QUICK,
        "--tasks",
        "lone",
    ]
    assert run([*command, "--seeds", "1", "--baselines", "random"]) == 0
    labels = ("my model", "random-like-my model")
    model, random = (json.loads((tmp_path / "lone" / label / "seed-0.json").read_text()) for label in labels)
    assert model["source"]["config"] == random["source"]["config"] and random["source"]["kind"] == "random"
    capsys.readouterr()
    assert run([*command, "--seeds", "2", "--baselines", "nothing"]) == 2  # before the second seed of the first model
    assert capsys.readouterr().err == "python -m finetune: error: nothing: not a directory\n"
    assert run([*command, "--baselines", "random", str(huggingface)]) == 2
    assert "two of the models are called my model" in capsys.readouterr().err


def test_a_missing_split_fails_that_task_alone_and_the_failure_is_written_until_it_is_mended(benchmark, tmp_path, capsys):
    out = tmp_path / "results"
    (benchmark / "a/x" / "train.csv").rename(tmp_path / "train.csv")
    assert gue(benchmark, out, "--seeds", "1", "--tasks", "a/x", "lone") == 2
    assert "train.csv: not found; a task is a folder with" in capsys.readouterr().err
    failure = json.loads((out / "a__x/random/seed-0.failed.json").read_text())
    assert (failure["task"], failure["model"], failure["seed"], failure["status"]) == ("a/x", "random", 0, 2)
    assert (out / "lone/random/seed-0.json").is_file()
    (tmp_path / "train.csv").rename(benchmark / "a/x" / "train.csv")
    assert gue(benchmark, out, "--seeds", "1", "--tasks", "a/x", "lone") == 0
    assert not list(out.rglob("*.failed.json"))


def test_a_process_that_dies_fails_its_run_and_the_next_ones_get_another(benchmark, tmp_path):
    workers = _Worker({}, tmp_path)
    runs = plan_runs("random", benchmark, seeds=1, names=["lone"], max_steps=2, warmup_steps=1, batch_size=8)
    workers.process.kill()
    workers.process.join()
    with pytest.raises(RuntimeError, match="its process died"):
        workers.execute(runs[0])
    assert workers.execute(runs[0])["task"] == "lone"
    workers.stop()
    assert not workers.process.is_alive()


def test_an_error_nobody_thought_of_fails_its_run_alone(benchmark, tmp_path, capsys, monkeypatch):
    def broken(run: Run, out: Path) -> dict:
        if run.task == "b/1":
            raise ValueError("Input contains NaN")
        return {"task": run.task, "already_done": False}

    monkeypatch.setattr("finetune.suite._execute", broken)
    assert gue(benchmark, tmp_path / "results", "--seeds", "1") == 1
    assert "b/1, random, seed 0, failed: ValueError: Input contains NaN" in capsys.readouterr().err
    failure = json.loads((tmp_path / "results" / "b__1" / "random" / "seed-0.failed.json").read_text())
    assert failure["status"] == 1


def test_a_suite_that_is_asked_to_stop_ends_its_processes_and_calls_nothing_a_failure(benchmark, tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, "-m", "finetune", "gue", "--model", "random", "--data", str(benchmark), "--out", str(out)]
    command += ["--seeds", "2", "--max-steps", "3000", "--warmup-steps", "1", "--epochs", "3000", "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(" | kernels: " in line for line in iter(process.stderr.readline, ""))  # a process is at work
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.terminate()
    rest = process.stderr.read()
    assert process.wait(60) == 75, rest
    assert "run the same command again to go on" in rest and "failed" not in rest and "Traceback" not in rest
    assert not list(out.rglob("*failed*"))
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_suite_that_is_killed_goes_on_where_it_was(benchmark, tmp_path):
    """SIGKILL in the middle of the second run; the first is not done again, the others are done."""
    out = tmp_path / "results"
    command = [sys.executable, "-m", "finetune", "gue", "--model", "random", "--data", str(benchmark), "--out", str(out)]
    command += ["--seeds", "2", "--max-steps", "60", "--warmup-steps", "1", "--batch-size", "8", "--epochs", "100"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    first, second = (out / "a__x" / "random" / f"seed-{seed}.json" for seed in (0, 1))
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert first.is_file() and not second.is_file()
    before = first.stat().st_mtime_ns
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["runs"], result["already_done"]) == (6, 1)
    assert first.stat().st_mtime_ns == before
    assert sorted(path.name for path in (out / "a__x" / "random").iterdir()) == [
        f"seed-{seed}.{kind}" for seed in (0, 1) for kind in ("json", "npz")
    ]
