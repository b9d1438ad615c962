from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import run
from finetune.run import FORMAT_VERSION


def write_result(
    results: Path, task: str, model: str, seed: int, mcc: float, *, collapsed: bool = False, **more: Any
) -> Path:
    split = {"sha256": "0", "truncated": more.get("truncated", 0)}
    result = {
        "format_version": FORMAT_VERSION,
        "task": task,
        "metric": "f1_macro" if task == "virus/covid" else "mcc",
        "model": model,
        "seed": seed,
        "settings": {"learning_rate": more.get("learning_rate", 3e-5)},
        "source": {"kind": more.get("kind", "pretrained"), "encoder_sha256": more.get("weights", "w")},
        "data": {"train": split, "dev": split, "test": split},
        "dev": {},
        "test": {"mcc": mcc, "f1_macro": more.get("f1", 0.5), "accuracy": 0.5},
        "collapsed": collapsed,
        "predictions": f"seed-{seed}.npz",
    }
    path = results / task.replace("/", "__") / model / f"seed-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    for seed, mcc in enumerate((0.70, 0.72, 0.71)):
        write_result(folder, "tf/0", "mine", seed, mcc)
    for seed, mcc in enumerate((0.50, 0.0, 0.54)):
        write_result(folder, "tf/0", "random", seed, mcc, collapsed=mcc == 0, kind="random", weights=str(seed))
    write_result(folder, "virus/covid", "mine", 0, 0.9, f1=0.70)
    write_result(folder, "EMP/H3", "mine", 0, 0.0, collapsed=True)
    write_result(folder, "my/own", "mine", 0, 0.25)
    return folder


def table(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "table.csv").open(newline="") as stream:
        return {(row["task"], row["model"]): row for row in csv.DictReader(stream)}


def test_means_and_deviations_over_seeds_beside_the_published_score(results, tmp_path, capsys):
    assert run(["report", str(results), "--out", str(tmp_path / "out"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["runs"], summary["rows"], summary["collapsed"]) == (9, 5, 2)
    rows = table(tmp_path / "out")
    mine = rows["tf/0", "mine"]
    assert float(mine["mean"]) == pytest.approx(71)
    assert float(mine["sd"]) == pytest.approx(statistics.stdev([70, 72, 71]))
    assert (mine["metric"], mine["seeds"], mine["collapsed"], mine["note"]) == ("mcc", "3", "0", "")
    assert float(mine["published_dnabert2"]) == 71.99
    covid = rows["virus/covid", "mine"]
    assert (covid["metric"], float(covid["mean"]), float(covid["published_dnabert2"])) == ("f1_macro", 70, 71.02)
    assert covid["sd"] == ""
    assert rows["my/own", "mine"]["published_dnabert2"] == ""


def test_collapsed_runs_are_flagged_and_not_averaged(results, tmp_path, capsys):
    assert run(["report", str(results), "--out", str(tmp_path)]) == 0
    assert "tf/0, random: 1 of 3 runs collapsed" in capsys.readouterr().err
    rows = table(tmp_path)
    random = rows["tf/0", "random"]
    assert float(random["mean"]) == pytest.approx(52)
    assert (random["seeds"], random["collapsed"]) == ("2", "1")
    assert random["note"] == "1 of 3 runs collapsed to one class and are not in the mean"
    assert rows["EMP/H3", "mine"]["mean"] == ""
    text = (tmp_path / "table.md").read_text()
    assert "| tf/0 | mine | MCC | 71.00 ± 1.00 | 3 |  | 71.99 |  |" in text
    assert "| tf/0 | random | MCC | 52.00 ± 2.83 | 2 | 1 | 71.99 | 1 of 3 runs collapsed" in text
    assert "| EMP/H3 | mine | MCC | – | 0 | 1 | 78.27 | 1 of 1 runs collapsed" in text
    assert "| my/own | mine | MCC | 25.00 | 1 |  | – |  |" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[6:]] == [
        "| EMP/H3",
        "| tf/0",
        "| tf/0",
        "| virus/covid",
        "| my/own",
    ]


def test_runs_that_are_not_of_one_kind_are_said(results, tmp_path):
    write_result(results, "tf/0", "mine", 3, 0.71, learning_rate=1e-4, weights="others", truncated=5)
    assert run(["report", str(results), "--out", str(tmp_path)]) == 0
    note = table(tmp_path)["tf/0", "mine"]["note"]
    assert note == ("the runs are not of one kind, they differ in learning_rate, weights; 5 test sequences truncated")


def test_what_is_not_a_results_folder_is_status_2(results, tmp_path, capsys):
    assert run(["report", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert run(["report", str(results / "tf__0"), "--out", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err
    path = results / "tf__0" / "mine" / "seed-1.json"
    for text, message in (
        ("[1]", "not a results file"),
        ('{"format_version": 99}', "format_version 99"),
        ('{"format_version": 1}', "not a whole results file, it has no 'task'"),
    ):
        path.write_text(text)
        assert run(["report", str(results), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert message in error
