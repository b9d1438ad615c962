from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cli import InputError, add_verb, main
from finetune.report.command import add_arguments, report, run
from finetune.tasks import PUBLISHED


def command(*argv: str) -> int:
    """The verb as a command of its own."""
    parser = argparse.ArgumentParser(prog="test")
    add_arguments(add_verb(parser.add_subparsers(required=True), "report", run, "Report."))
    return main(parser, ["report", *argv])


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open(newline="") as stream:
        return {(row["task"], row["model"]): row for row in csv.DictReader(stream)}


def score(path: Path, which: str = "test") -> float:
    result = json.loads(path.read_text())
    return 100 * result[which][result["metric"]]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}", 1)[1].split("\n## ")[0]


@pytest.fixture
def filled(results):
    """Two models in three tasks, one of them with runs that collapsed or failed."""
    for task in ("tf/0", "virus/covid", "my/own"):
        for seed in range(3):
            results.add(task, "mine", seed, accuracy=0.9, classes=3)
    for seed in range(3):
        results.add("tf/0", "random", seed, accuracy=0.6, classes=3, kind="random", weights=str(seed), collapsed=seed == 1)
        results.add("virus/covid", "random", seed, classes=3, kind="random", collapsed=True)
    results.add("my/own", "random", 0, classes=3, kind="random")
    results.fail("my/own", "random", 1)
    return results


def test_means_deviations_and_intervals_beside_the_published_scores(filled, tmp_path, capsys):
    assert command(str(filled.folder), "--out", str(tmp_path / "out"), "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert [summary[key] for key in ("runs", "rows", "tasks", "collapsed", "failed")] == [16, 6, 3, 4, 1]
    assert summary["reference"] == "random" and summary["verdict"] is None
    rows = read(tmp_path / "out" / "table.csv")
    mine = rows["tf/0", "mine"]
    scores = [score(filled.folder / "tf__0" / "mine" / f"seed-{seed}.json") for seed in range(3)]
    assert float(mine["mean"]) == pytest.approx(statistics.fmean(scores))
    assert float(mine["sd"]) == pytest.approx(statistics.stdev(scores))
    assert float(mine["low"]) < float(mine["mean"]) < float(mine["high"]) < float(mine["low"]) + 20
    assert (mine["metric"], mine["seeds"], mine["collapsed"], mine["note"]) == ("mcc", "3", "0", "")
    assert (mine["published_dnabert2"], mine["published_dnabert2_fp"]) == ("71.99", "69.12")
    covid = rows["virus/covid", "mine"]
    assert (covid["metric"], covid["published_dnabert2"]) == ("f1_macro", "71.02")
    assert rows["my/own", "random"]["sd"] == rows["my/own", "mine"]["published_dnabert2"] == ""
    text = (tmp_path / "out" / "table.md").read_text()
    deviation = f"{float(mine['mean']):.2f} ± {float(mine['sd']):.2f}"
    reach = f"{float(mine['low']):.2f} to {float(mine['high']):.2f}"
    assert f"| tf/0 | mine | MCC | {deviation} | {reach} | 3 |  |  | 71.99 | 69.12 |  |" in text
    tasks = [line.split(" | ")[0] for line in text.split("\n\n")[2].splitlines()[2:]]
    assert tasks == ["| tf/0", "| tf/0", "| virus/covid", "| virus/covid", "| my/own", "| my/own"]


def test_runs_that_collapsed_or_failed_are_said_and_not_averaged(filled, tmp_path, capsys):
    assert command(str(filled.folder), "--out", str(tmp_path)) == 0
    assert "tf/0, random: 1 of 3 runs collapsed" in capsys.readouterr().err
    rows = read(tmp_path / "table.csv")
    random = rows["tf/0", "random"]
    scores = [score(filled.folder / "tf__0" / "random" / f"seed-{seed}.json") for seed in (0, 2)]
    assert float(random["mean"]) == pytest.approx(statistics.fmean(scores))
    assert (random["seeds"], random["collapsed"]) == ("2", "1")
    assert random["note"] == "1 of 3 runs collapsed to one class and are not in the mean"
    assert (rows["virus/covid", "random"]["mean"], rows["virus/covid", "random"]["low"]) == ("", "")
    assert rows["my/own", "random"]["note"] == "1 of 2 runs failed"
    text = (tmp_path / "table.md").read_text()
    assert "* my/own, random, seed 1: the training loss is nan (status 1)" in section(text, "Runs that failed")
    means = section(text, "Means over the paper's groups")
    assert "| CVC | random | 0 of 1 | – * |" in means and "no run of virus/covid counts" in means
    assert "| all | mine | 2 of 28 |" in means and "| all | random | 1 of 28 |" in means
    assert "(in 1) |" in means  # the difference of "all" is over tf/0 alone


def test_a_failure_note_beside_a_later_result_does_not_count(results, tmp_path):
    results.fail("tf/0", "mine", 0)
    assert report(results.folder, tmp_path)["failed"] == 1  # and a table of failures alone can be written
    assert "| tf/0 | mine | MCC | – |" in (tmp_path / "table.md").read_text()
    results.add("tf/0", "mine")
    assert report(results.folder, tmp_path)["failed"] == 0


def test_equal_results_give_equal_bytes_and_other_models_change_no_interval(filled, tmp_path):
    names = ("table.md", "table.csv", "comparison.csv", "scores.png")
    for out in ("a", "b"):
        report(filled.folder, tmp_path / out)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert (tmp_path / "a" / "scores.png").read_bytes().startswith(b"\x89PNG")
    filled.add("tf/0", "another", classes=3)
    report(filled.folder, tmp_path / "c")
    before, after = (read(tmp_path / out / "table.csv") for out in ("a", "c"))
    assert before["tf/0", "mine"] == after["tf/0", "mine"]


def test_differences_are_tested_and_adjusted_over_tasks(results, tmp_path):
    for number, accuracy in enumerate((0.95, 0.9, 0.7)):
        for seed in range(3):
            results.add(f"tf/{number}", "a", seed, accuracy=0.7, rows=400)
            results.add(f"tf/{number}", "b", seed, accuracy=accuracy, rows=400)
    assert report(results.folder, tmp_path)["reference"] is None
    assert (tmp_path / "comparison.csv").read_text().count("\n") == 1
    assert "Differences" not in (tmp_path / "table.md").read_text()
    assert report(results.folder, tmp_path, reference="a")["reference"] == "a"
    rows = read(tmp_path / "comparison.csv")
    planted, none = rows["tf/0", "b"], rows["tf/2", "b"]
    assert planted["reference"] == "a"
    assert 0 < float(planted["low"]) < float(planted["difference"]) < float(planted["high"])
    assert float(planted["p"]) == pytest.approx(1 / 2001) and float(planted["p_holm"]) == pytest.approx(3 / 2001)
    assert float(none["low"]) < 0 < float(none["high"]) and float(none["p_holm"]) > 0.05
    text = report(results.folder, tmp_path, compare=["a", "b"])["verdict"]
    low, high = map(float, re.findall(r"interval ([+-][\d.]+) to ([+-][\d.]+)", text)[0])
    widths = [float(row["high"]) - float(row["low"]) for row in rows.values()]
    assert low < 0.9 * high and (high - low) > min(widths) / len(widths)  # as wide as rows and seeds make it
    assert "after Holm's adjustment, better in 2 and worse in 0" in text and text in (tmp_path / "table.md").read_text()
    assert "better in 0 and worse in 2" in report(results.folder, tmp_path, compare=["b", "a"])["verdict"]


def test_two_models_of_many_are_compared(filled, tmp_path):
    filled.add("tf/0", "third", classes=3)
    assert report(filled.folder, tmp_path, compare=["third", "mine"])["tasks"] == 3
    assert {model for _, model in read(tmp_path / "table.csv")} == {"third", "mine"}
    notes = {task: row["note"] for (task, _), row in read(tmp_path / "comparison.csv").items()}
    assert notes["tf/0"] == "" and notes["virus/covid"] == "the reference has no score here"


def test_scores_on_other_test_rows_are_not_compared(results, tmp_path):
    results.add("tf/0", "a")
    results.add("tf/0", "b", labels_seed=1)
    results.add("tf/1", "a")
    results.add("tf/1", "b")
    results.add("tf/1", "b", 1, labels_seed=1)
    verdict = report(results.folder, tmp_path, compare=["a", "b"])["verdict"]
    rows = read(tmp_path / "comparison.csv")
    assert rows["tf/0", "b"]["difference"] == ""
    assert rows["tf/0", "b"]["note"] == "not compared, the test rows are not the same"
    assert rows["tf/1", "b"]["p"] == "" and rows["tf/1", "b"]["note"] == "not tested, an interval is missing"
    assert "the runs have different test rows" in read(tmp_path / "table.csv")["tf/1", "b"]["note"]
    assert "1 could not be tested. 1 more could not be compared." in verdict


def test_leaked_rows_have_a_column_of_their_own_and_can_be_left_out(results, tmp_path):
    paths = [results.add("mouse/3", "mine", seed, accuracy=0.6, leaked=50) for seed in range(2)]
    results.add("tf/0", "mine", accuracy=0.6)
    report(results.folder, tmp_path)
    row = read(tmp_path / "table.csv")["mouse/3", "mine"]
    clean = statistics.fmean(score(path, "test_clean") for path in paths)
    assert float(row["mean_without_leaked"]) == pytest.approx(clean)
    assert clean < float(row["mean"]) - 5
    assert read(tmp_path / "table.csv")["tf/0", "mine"]["mean_without_leaked"] == ""
    text = (tmp_path / "table.md").read_text()
    assert "without leaked rows" in text and "mouse/3 50 of 200" in text
    report(results.folder, tmp_path, clean=True)
    again = read(tmp_path / "table.csv")["mouse/3", "mine"]
    assert float(again["mean"]) == pytest.approx(clean) and float(again["high"]) < float(row["high"])
    results.add("mouse/4", "mine", leaked=200)
    report(results.folder, tmp_path, clean=True)
    assert read(tmp_path / "table.csv")["mouse/4", "mine"]["note"] == "every test row is leaked"


def test_regression_is_scored_by_correlation(results, tmp_path):
    for seed in range(2):
        results.add("my/expression", "mine", seed, classes=1)
        results.add("my/expression", "worse", seed, classes=1, accuracy=0.3)
    report(results.folder, tmp_path, compare=["worse", "mine"])
    row = read(tmp_path / "table.csv")["my/expression", "mine"]
    assert row["metric"] == "pearson" and float(row["low"]) < float(row["mean"]) < float(row["high"])
    assert float(read(tmp_path / "comparison.csv")["my/expression", "mine"]["p"]) < 0.01


def test_runs_that_are_not_of_one_kind_are_said(results, tmp_path):
    results.add("tf/0", "mine", 0)
    results.add("tf/0", "mine", 1, learning_rate=1e-4, weights="others", truncated=5)
    report(results.folder, tmp_path)
    note = read(tmp_path / "table.csv")["tf/0", "mine"]["note"]
    assert note == "the runs are not of one kind, they differ in learning_rate, weights; 5 test sequences truncated"
    assert "The runs of `mine` began with different pre-trained weights" in (tmp_path / "table.md").read_text()


def test_one_seed_and_missing_predictions_are_said(results, tmp_path):
    results.add("tf/0", "mine")
    results.add("tf/1", "mine", 0)
    path = results.add("tf/1", "mine", 1)
    results.add("tf/0", "kmer", method="kmer", kind="baseline")
    path.with_suffix(".npz").unlink()
    report(results.folder, tmp_path)
    rows = read(tmp_path / "table.csv")
    assert rows["tf/1", "mine"]["note"] == "no interval: predictions are gone"
    assert rows["tf/1", "mine"]["mean"] != "" and rows["tf/1", "mine"]["low"] == ""
    notes = section((tmp_path / "table.md").read_text(), "Notes")
    assert "One seed only, so the interval is of the test rows alone: mine in tf/0." in notes
    assert "Every seed gives the same numbers, so the intervals are of the test rows alone: kmer." in notes


def test_what_differs_from_the_published_protocol_is_said_once(results, tmp_path):
    for task in ("tf/0", "EMP/H3"):
        for seed in range(3):
            results.add(task, "mine", seed, batch_size=16)
        results.add(task, "lora", method="lora", batch_size=16, max_length=64, clean=True)
        results.add(task, "kmer", method="kmer", kind="baseline")
    results.add("my/own", "mine")
    report(results.folder, tmp_path)
    lines = section((tmp_path / "table.md").read_text(), "What differs from the published protocol").splitlines()
    for line in (
        "* `lora`, `mine`: the weights of the highest dev score are kept; published: of the lowest dev loss.",
        "* `lora`, `mine`: matrix products in fp32; published: fp16.",
        "* `lora`, `mine`: batch_size 16; published: 32.",
        "* `mine`: run under the protocol `strict`, with batch_size changed.",
        "* `kmer`: run under the protocol `strict`.",
        "* `mine`: no sequence is truncated; the published scripts truncate.",
        "* `lora` in tf/0: sequences are truncated at 64 tokens; published: 30.",
        "* `lora`: only low-rank updates are trained (LoRA); published: all weights.",
        "* `lora`: learning_rate 0.0001; published: 3e-05 (the default of lora).",
        "* `lora`: fewer than 3 seeds.",
        "* `lora`: dev rows whose sequence is in train are left out.",
        "* `kmer`: a baseline without encoder: logistic regression on counts of k-mers.",
        "* my/own: not in the benchmark; nothing is published to differ from.",
    ):
        assert line in lines
    rows = next(line for line in lines if "Rows of train/dev/test" in line)
    assert "tf/0 200/200/200 (theirs 32,378/1,000/1,000)" in rows
    assert not any("kmer` in" in line for line in lines)


def test_the_published_protocol_differs_from_itself_in_the_precision_alone(results, tmp_path):
    from finetune.audit import PUBLISHED_ROWS
    from finetune.tasks import settings_for

    for seed in range(3):
        path = results.add("tf/0", "mine", seed)
        result = json.loads(path.read_text())
        for split, rows in zip(("train", "dev", "test"), PUBLISHED_ROWS["tf/0"], strict=True):
            result["data"][split]["rows"] = rows
        edit(path, data=result["data"], protocol="paper", settings=settings_for("tf/0", "paper").model_dump(mode="json"))
    report(results.folder, tmp_path)
    lines = section((tmp_path / "table.md").read_text(), "What differs from the published protocol").split("\n")
    assert [line for line in lines if line] == ["* All: matrix products in fp32; published: fp16."]


def test_all_tasks_and_more_models_than_colours_can_be_drawn(results, tmp_path):
    for task in PUBLISHED:
        for number in range(10):
            results.add(task, f"model-{number}", rows=20)
    assert report(results.folder, tmp_path)["rows"] == 10 * len(PUBLISHED)
    means = section((tmp_path / "table.md").read_text(), "Means over the paper's groups")
    assert "| all | model-0 | 28 |" in means and "| 66.80 | 67.78 |" in means


def test_what_is_not_a_results_folder_is_status_2(results, tmp_path, capsys):
    path = results.add("tf/0", "mine")
    out = ("--out", str(tmp_path / "out"))
    for argv, message in (
        ([str(tmp_path / "nothing")], "no such folder"),
        ([str(results.folder / "tf__0")], "no results"),
        ([str(results.folder), "--reference", "other"], "no runs of a model called 'other'; there are mine"),
        ([str(results.folder), "--compare", "mine", "other"], "no runs of a model called 'other'"),
        ([str(results.folder), "--compare", "mine", "mine"], "takes two models"),
    ):
        assert command(*argv, *out) == 2
        assert message in capsys.readouterr().err
    for text, message in (("[1]", "not a results file"), ('{"format_version": 99}', "format_version 99")):
        path.write_text(text)
        assert command(str(results.folder), *out) == 2
        error = capsys.readouterr().err
        assert str(path) in error and message in error
    assert not (tmp_path / "out").exists()


def test_results_that_contradict_each_other_are_refused(results, tmp_path):
    path = results.add("tf/0", "mine")
    copy = results.folder / "copy" / "mine" / path.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(path.read_bytes())
    copy.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes())
    with pytest.raises(InputError, match="are both tf/0, mine, seed 0; remove one"):
        report(results.folder, tmp_path)
    copy.unlink()
    other = results.add("tf/0", "mine", 1)
    edit(other, metric="f1_macro")
    with pytest.raises(InputError, match="one for all of tf/0"):
        report(results.folder, tmp_path)
    other.unlink()
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = dict(stored)
    np.savez(path.with_suffix(".npz"), **arrays | {"test_logits": arrays["test_logits"][::-1]})
    with pytest.raises(InputError, match="remove both and run again"):
        report(results.folder, tmp_path)
    path.with_suffix(".npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match="not the predictions of a run"):
        report(results.folder, tmp_path)
    results.fail("tf/0", "mine", 2).write_text("{}")
    path.with_suffix(".npz").unlink()
    with pytest.raises(InputError, match="of a run that failed; remove it"):
        report(results.folder, tmp_path)
