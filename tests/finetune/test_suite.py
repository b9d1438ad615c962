"""`python -m finetune gue`: all tasks x seeds, divided, repeated, with one that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.__main__ import run
from finetune.suite import find_tasks, results_files

QUICK = ["--max-steps", "2", "--warmup-steps", "1", "--batch-size", "8"]


@pytest.fixture
def benchmark(planted: Path, tmp_path: Path) -> Path:
    """Three tasks in folders of two depths, and a folder that is none."""
    root = tmp_path / "GUE"
    for name in ("b/1", "a/x", "lone"):
        (root / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = (planted / f"{split}.csv").read_text().splitlines(keepends=True)[:17]
            (root / name / f"{split}.csv").write_text("".join(rows))
    (root / "raw").mkdir()
    (root / "raw" / "train.csv").write_text("sequence,label\n")
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
    files = results_files(benchmark, out, "random", 2)
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
    assert "1 of 3 runs failed, the log says why: a/x seed 0" in err and "label 7" in err
    assert len(list((tmp_path / "results").rglob("seed-0.json"))) == 2


def test_where_running_again_may_help_the_status_says_so(benchmark, tmp_path, capsys):
    (benchmark / "a/x" / "dev.csv").write_text("sequence,label\nACGT,7\n")
    assert gue(benchmark, tmp_path / "results", "--seeds", "1", "--tasks", "a/x", "lone", "--learning-rate", "1e30") == 1
    err = capsys.readouterr().err
    assert "2 of 2 runs failed, the log says why: a/x seed 0, lone seed 0" in err and "try a lower --learning-rate" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "a/y"], "has no task a/y; it has a/x, b/1, lone"),
        (["--num-tasks", "2"], "--num-tasks and --task go together"),
        (["--num-tasks", "2", "--task", "2"], "--task 2: must be from 0 to --num-tasks - 1 = 1"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
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
