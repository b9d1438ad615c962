from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.cli import InputError
from finetune.folders import task_name
from finetune.report.collect import PUBLISHED_FILE
from finetune.tasks import GROUPS, PUBLISHED, PUBLISHED_MAX_LENGTH, metric_of, settings_for


def test_table_has_the_28_tasks_of_the_published_scores_and_8_of_gue_plus():
    published = json.loads(PUBLISHED_FILE.read_text())
    assert set(PUBLISHED) > set(published["scores"]) == {task for tasks in GROUPS.values() for task in tasks}
    assert (len(PUBLISHED), len(published["scores"])) == (36, 28)
    assert all(len(row) == len(published["models"]) == 10 for row in published["scores"].values())
    for task in published["scores"]:
        assert sum(task.startswith(prefix) for prefix in PUBLISHED_MAX_LENGTH) == 1


def test_published_means_follow_from_the_published_scores():
    published = json.loads(PUBLISHED_FILE.read_text())
    groups = GROUPS | {"all": tuple(published["scores"])}
    assert set(groups) == set(published["means"])
    for group, tasks in groups.items():
        rows = [published["scores"][task] for task in tasks]
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert means == pytest.approx(published["means"][group], abs=0.0101)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("EMP/H3K4me1", {"epochs": 3, "max_steps": None, "warmup_steps": 50, "batch_size": 32, "eval_every": 200}),
        ("prom/prom_core_all", {"epochs": 4, "eval_every": 400}),
        ("prom/prom_core_tata", {"epochs": 10, "eval_every": 200}),
        ("prom/prom_300_notata", {"epochs": 4, "eval_every": 400}),
        ("prom/prom_300_tata", {"epochs": 10, "eval_every": 200}),
        ("splice/reconstructed", {"epochs": 5, "max_length": None}),
        ("tf/3", {"epochs": 3, "warmup_steps": 30}),
        ("mouse/2", {"epochs": None, "max_steps": 1000, "warmup_steps": 30}),
        ("virus/covid", {"epochs": 8, "batch_size": 128}),
        ("my/own", {"epochs": 3, "batch_size": 32}),
    ],
)
def test_settings_are_the_published_ones(task, expected):
    settings = settings_for(task).model_dump()
    assert {key: settings[key] for key in expected} == expected
    assert settings["learning_rate"] == 3e-5
    assert settings["weight_decay"] == 0.01


def test_what_is_given_wins_and_what_is_not_does_not():
    settings = settings_for("tf/0", learning_rate=1e-3, epochs=None, warmup_steps=0)
    assert (settings.learning_rate, settings.epochs, settings.warmup_steps) == (1e-3, 3, 0)


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 0.0), ("learning_rate", float("nan")), ("batch_size", 0), ("max_length", 2)]
)
def test_a_setting_that_makes_no_sense_is_named(key, value):
    with pytest.raises(InputError, match="--" + key.replace("_", "-")):
        settings_for("tf/0", **{key: value})


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/data/GUE/tf/0", "tf/0"),
        ("/data/gue/prom/prom_300_tata/", "prom/prom_300_tata"),
        ("/gue/old/GUE/EMP/H3", "EMP/H3"),
        ("/data/mine/enhancers", "mine/enhancers"),
        ("/enhancers", "enhancers"),
        ("/data/gue", "data/gue"),
        ("/data/GUE_v2/EMP/H3K4me3", "EMP/H3K4me3"),
        ("/copies/emp_H3", "EMP/H3"),
        ("/copies/GUE/human_tf_0", "tf/0"),
        ("/copies/GUE/tf_1", "tf/1"),
        ("/mine/mouse_0", "mine/mouse_0"),
        ("/mine/covid", "mine/covid"),
        ("/data/GUE/EMP/H3.csv", "EMP/H3.csv"),
        ("/copies/GUE/prom_core_all", "prom/prom_core_all"),
        ("/copies/splice_reconstructed", "splice/reconstructed"),
        ("/copies/GUE/virus_covid", "virus/covid"),
        ("/data/GUE+/EPI/HeLa-S3", "EPI/HeLa-S3"),
        ("/data/GUE_plus/fungi_species_20", "fungi_species_20"),
        ("/mine/H3", "mine/H3"),
        ("/mine/0", "mine/0"),
        ("/mine/enhancers.csv", "mine/enhancers.csv"),
    ],
)
def test_task_name(folder, name):
    assert task_name(Path(folder)) == name


def test_the_two_protocols_differ_in_what_is_chosen_and_truncated():
    strict, paper = settings_for("splice/reconstructed"), settings_for("splice/reconstructed", "paper")
    assert (strict.best_by, strict.max_length, paper.best_by, paper.max_length) == ("score", None, "loss", 80)
    same = {"best_by", "max_length"}
    assert strict.model_dump(exclude=same) == paper.model_dump(exclude=same)
    assert settings_for("splice/reconstructed", "paper", max_length=90).max_length == 90
    assert settings_for("my/own", "paper").max_length is None
    assert settings_for("tf/0", method="lora").learning_rate == 1e-4
    assert settings_for("EPI/K562").learning_rate == 2e-5
    assert settings_for("tf/0", method="probe").pooling == "mean"


def test_covid_is_scored_by_f1():
    assert metric_of("virus/covid") == "f1_macro"
    assert metric_of("tf/0") == "mcc"
