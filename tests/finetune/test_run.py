"""`python -m finetune run` as a user meets it: the results file, running again, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from finetune.__main__ import run

QUICK = ["--learning-rate", "2e-3", "--max-steps", "40", "--warmup-steps", "5", "--eval-every", "15"]


def command(task: Path, out: Path, *more: str) -> list[str]:
    return ["run", "--model", "random", "--task", str(task), "--out", str(out), *QUICK, *more]


@pytest.fixture(scope="module")
def finished(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of one run with seed 0."""
    out = tmp_path_factory.mktemp("finished")
    assert run(command(planted, out)) == 0
    return out


def stored(out: Path) -> tuple[Path, dict]:
    path = out / "made__up" / "random" / "seed-0.json"
    return path, json.loads(path.read_text())


def test_a_results_file_has_what_it_takes_to_repeat_the_run(finished, planted):
    path, result = stored(finished)
    assert (result["task"], result["model"], result["seed"], result["metric"]) == ("made/up", "random", 0, "mcc")
    assert result["command"].startswith("python -m finetune run --model random --task")
    assert result["settings"]["learning_rate"] == 2e-3
    assert result["settings"]["weight_decay"] == 0.01
    assert result["source"]["config"]["hidden_size"] == 128
    assert all(len(result["source"][key]) == 64 for key in ("encoder_sha256", "tokenizer_sha256"))
    train = result["data"]["train"]
    assert (train["rows"], train["rows_a_class"], train["truncated"]) == (600, [300, 300], 0)
    assert len(train["sha256"]) == 64
    assert set(result["environment"]["versions"]) >= {"python", "torch", "numpy", "scikit-learn", "tokenizers"}
    assert [entry["step"] for entry in result["curves"]] == [15, 30, 40]
    assert result["best_step"] in (15, 30, 40)
    assert result["train_tokens"] > 40 * 32 * 3
    assert result["collapsed"] is False
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["seed-0.json", "seed-0.npz"]


def test_the_signal_is_learnt_and_the_score_is_that_of_the_stored_predictions(finished):
    path, result = stored(finished)
    with np.load(path.with_name(result["predictions"])) as arrays:
        predicted = arrays["test_logits"].argmax(-1)
        assert result["test"]["mcc"] == matthews_corrcoef(arrays["test_labels"], predicted)
        assert arrays["dev_logits"].shape == (100, 2)
    assert result["test"]["mcc"] > 0.5
    assert result["dev"]["mcc"] == max(entry["dev_mcc"] for entry in result["curves"])


def test_the_same_command_elsewhere_gives_the_same_numbers(finished, planted, tmp_path):
    assert run(command(planted, tmp_path)) == 0
    (first_path, first), (second_path, second) = stored(finished), stored(tmp_path)
    for key in ("settings", "source", "data", "curves", "best_step", "dev", "test", "train_tokens"):
        assert first[key] == second[key], key
    with np.load(first_path.with_suffix(".npz")) as a, np.load(second_path.with_suffix(".npz")) as b:
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_not_done_again(finished, planted, capsys):
    path, _ = stored(finished)
    before = path.stat().st_mtime_ns
    assert run(command(planted, finished, "--json")) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert "done already" in err
    assert (result["already_done"], result["path"]) == (True, str(path))
    assert {"task", "model", "seed", "test_mcc", "test_f1", "dev_loss", "best_step", "tokens_per_second"} <= set(result)
    assert path.stat().st_mtime_ns == before


def test_a_fit_without_steps_is_the_same_run_whatever_the_steps(planted, tmp_path, capsys):
    kmer = ["run", "--model", "kmer", "--task", str(planted), "--out", str(tmp_path)]
    assert run(kmer) == 0
    assert run([*kmer, "--learning-rate", "1e-4", "--max-steps", "60", "--protocol", "paper", "--best-by", "score"]) == 0
    assert "done already" in capsys.readouterr().err
    result = json.loads((tmp_path / "made__up" / "kmer-logistic" / "seed-0.json").read_text())
    assert result["changed"] == []
    assert run([*kmer, "--clean"]) == 2


def test_a_warm_up_that_nobody_gave_is_fitted_to_a_short_run(planted, tmp_path, capsys):
    short = ["run", "--model", "random", "--task", str(planted), "--out", str(tmp_path), "--max-steps", "20"]
    assert run(short) == 0
    assert "the run has 20 steps, so its warm-up is 2 steps instead of 50" in capsys.readouterr().err
    result = json.loads((tmp_path / "made__up" / "random" / "seed-0.json").read_text())
    assert result["settings"]["warmup_steps"] == 2 and result["changed"] == ["max_steps", "warmup_steps"]
    assert run([*short, "--warmup-steps", "20"]) == 2
    assert "--warmup-steps 20: the run has only 20 steps" in capsys.readouterr().err


def test_other_columns_are_another_run(planted, tmp_path, capsys):
    for split in ("train", "dev", "test"):
        rows = (planted / f"{split}.csv").read_text().splitlines()
        other = ["sequence,label,other", *(f"{row},{number % 2}" for number, row in enumerate(rows[1:]))]
        (tmp_path / "task").mkdir(exist_ok=True)
        (tmp_path / "task" / f"{split}.csv").write_text("\n".join(other) + "\n")
    kmer = ["run", "--model", "kmer", "--task", str(tmp_path / "task"), "--out", str(tmp_path / "results")]
    assert run(kmer) == 0
    assert run([*kmer, "--label-column", "other"]) == 2
    assert "differs in columns (['sequence', 'label'] there, ['sequence', 'other'] here)" in capsys.readouterr().err


def test_predictions_of_another_run_are_made_again(planted, tmp_path, capsys):
    kmer = ["run", "--model", "kmer", "--task", str(planted), "--out", str(tmp_path / "results")]
    assert run(kmer) == 0
    (predictions,) = (tmp_path / "results").rglob("*.npz")
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[:-1] + b"x")
    assert run(kmer) == 0
    assert "its predictions are gone, or of another run" in capsys.readouterr().err
    with np.load(predictions) as arrays:
        assert len(arrays["test_labels"]) == 100


def test_the_network_takes_any_number_of_bases(small_task, tmp_path):
    with (small_task / "test.csv").open("a") as stream:
        stream.write(f"{'ACGT' * 3000},1\n")
    quick = ["--max-steps", "2", "--warmup-steps", "1", "--batch-size", "8"]
    assert run(["run", "--model", "cnn", "--task", str(small_task), "--out", str(tmp_path / "results"), *quick]) == 0
    assert (tmp_path / "results" / "small__task" / "cnn" / "seed-0.json").is_file()


def test_another_run_does_not_overwrite_it(finished, planted, capsys):
    before = stored(finished)
    assert run(command(planted, finished, "--batch-size", "16", "--weight-decay", "0")) == 2
    assert "batch_size (32 there, 16 here), weight_decay (0.01 there, 0.0 here)" in capsys.readouterr().err
    assert stored(finished) == before


def test_a_checkpoint_and_random_weights_of_its_shape_are_two_models_of_one_table(huggingface, planted, tmp_path, capsys):
    last = "--model", str(huggingface)
    assert run(command(planted, tmp_path, *last, "--max-steps", "6")) == 0
    assert run(command(planted, tmp_path, "--like", str(huggingface), "--max-steps", "6", "--label", "random")) == 0
    pretrained = json.loads((tmp_path / "made__up" / "my model" / "seed-0.json").read_text())
    _, random = stored(tmp_path)
    assert pretrained["source"]["tokenizer_sha256"] == random["source"]["tokenizer_sha256"]
    assert pretrained["source"]["config"] == random["source"]["config"]
    assert pretrained["source"]["encoder_sha256"] != random["source"]["encoder_sha256"]
    assert (pretrained["source"]["kind"], random["source"]["kind"]) == ("pretrained", "random")
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "tables"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 2


Damage = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "sequence,lable\nACGT,0\n", "train.csv, line 1: no column 'label'"),
        ("dev", "sequence,label\nACGT,0\nACGT,x\n", "dev.csv, line 3: label 'x' is not an integer"),
        ("dev", "sequence,label\nACGT,0\nACGT,2\n", "train.csv: has no row of class 2, but "),
        ("test", "sequence,label\n,1\n", "test.csv, line 2: the sequence is empty"),
        ("test", "", "test.csv: the file is empty"),
    ],
)
def test_bad_files_are_status_2(damage: Damage, capsys, tmp_path, split, text, message):
    path = damage(split, text)
    out = tmp_path / "results"
    assert run(command(path.parent, out)) == 2
    error = capsys.readouterr().err
    assert str(path.parent) in error
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--warmup-steps", "40"], "--warmup-steps 40: the run has only 40 steps"),
        (["--seed", "-1"], "--seed -1"),
        (["--label", "../x"], "--label '../x'"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--like", "x", "--model", "y"], "--like goes with --model random"),
    ],
)
def test_bad_settings_are_status_2(planted, tmp_path, capsys, more: Sequence[str], message):
    assert run(command(planted, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_split_and_a_results_folder_that_is_a_file_are_status_2(small_task, tmp_path, capsys):
    blocked = tmp_path / "results"
    blocked.write_text("")
    assert run(command(small_task, blocked, "--batch-size", "4")) == 2
    assert "results can't be written there" in capsys.readouterr().err
    (small_task / "train.csv").unlink()
    assert run(command(small_task, tmp_path / "out")) == 2
    assert "train.csv: not found" in capsys.readouterr().err


def test_a_run_whose_loss_explodes_leaves_no_score(small_task, tmp_path, capsys):
    assert run(command(small_task, tmp_path, "--learning-rate", "1e38", "--batch-size", "4", "--eval-every", "8")) == 1
    assert "loss is nan at step 8" in capsys.readouterr().err
    assert list(tmp_path.glob("*__*/*/*")) == []


def test_a_damaged_results_file_is_named(planted, tmp_path, capsys):
    path = tmp_path / "made__up" / "random" / "seed-0.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert run(command(planted, tmp_path)) == 2
    assert "seed-0.json: not a results file" in capsys.readouterr().err


def test_truncation_and_other_letters_are_said_and_counted(small_task, tmp_path, capsys):
    with (small_task / "train.csv").open("a") as stream:
        stream.write("ACGTNNNNacgtACGT,1\n")
    options = ("--batch-size", "4", "--max-length", "6")
    assert run(command(small_task, tmp_path, *options)) == 0
    error = capsys.readouterr().err
    assert "train.csv: 8 letters other than A, C, G, T in 1 sequences" in error
    assert "of 17 sequences truncated by --max-length" in error
    result = json.loads((tmp_path / "small__task" / "random" / "seed-0.json").read_text())
    assert result["data"]["train"]["longest"] == 6
    assert result["data"]["train"]["truncated"] > 0
    assert result["data"]["train"]["other_letters"] == 8
