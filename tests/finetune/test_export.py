"""`run --export` and `predict`: a fine-tuned model that leaves this project and comes back."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.__main__ import run

from .conftest import planted_rows, write_csv

QUICK = ["--learning-rate", "3e-3", "--max-steps", "30", "--warmup-steps", "3", "--eval-every", "10"]
# In a process of its own, away from the repository: what a user of transformers runs.
HUGGINGFACE = """
import csv, json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
directory, path, columns = sys.argv[1], sys.argv[2], sys.argv[3].split()
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True).eval()
rows = list(csv.DictReader(open(path)))
texts = [[row[column] for row in rows] for column in columns]
with torch.no_grad():
    logits = model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits
print(json.dumps(logits.tolist()))
"""


def transformers_logits(directory: Path, path: Path, columns: str, cwd: Path) -> np.ndarray:
    command = [sys.executable, "-c", HUGGINGFACE, str(directory), str(path), columns]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def predictions(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module", params=["full", "lora", "regression", "pairs"])
def exported(request, planted, huggingface, tmp_path_factory) -> tuple[str, Path, Path, Path]:
    """The kind, the task folder, the results folder and the exported model of one run."""
    kind, out = request.param, tmp_path_factory.mktemp(request.param)
    task, more = planted, ["--pooling", "mean"]
    if kind == "lora":
        more = ["--method", "lora", "--learning-rate", "1e-2"]
    if kind in ("regression", "pairs"):
        task = out / "task"
        for seed, split in enumerate(("train", "dev", "test")):
            rows = planted_rows(200, seed)
            if kind == "regression":
                numbers = [(text, 100 + 10 * sum(letter in "CG" for letter in text) / len(text)) for text, _ in rows]
                write_csv(task / f"{split}.csv", numbers)  # type: ignore[arg-type]
            else:
                pairs = [(text, "AC" * 5, label) for text, label in rows]
                write_csv(task / f"{split}.csv", pairs, ("first", "second", "label"))  # type: ignore[arg-type]
    command = ["run", "--model", str(huggingface), "--task", str(task), "--out", str(out / "results"), *QUICK, *more]
    assert run([*command, "--export", str(out / "hf")]) == 0
    return kind, task, out / "results", out / "hf"


def test_transformers_and_predict_give_the_scored_outputs(exported, tmp_path):
    kind, task, results, directory = exported
    columns = ["first", "second"] if kind == "pairs" else ["sequence"]
    (path,) = results.rglob("seed-0.npz")
    with np.load(path) as arrays:
        expected = arrays["test_logits"]
    found = transformers_logits(directory, task / "test.csv", " ".join(columns), tmp_path)
    assert np.abs(found - expected).max() < (1e-2 if kind == "regression" else 1e-4)  # labels are about 100
    out = tmp_path / "predicted.csv"
    command = ["predict", "--model", str(directory), "--input", str(task / "test.csv"), "--out", str(out)]
    assert run([*command, "--columns", *columns]) == 0
    rows = predictions(out)
    assert [row["name"] for row in rows[:2]] == ["row-1", "row-2"] and len(rows) == len(expected)
    given = out.read_bytes()
    assert run(command) == 0 and out.read_bytes() == given  # the columns that it was trained on
    if kind == "regression":
        assert np.abs(np.array([float(row["value"]) for row in rows]) - expected[:, 0]).max() < 1e-2
    else:
        chances = np.array([[float(row["probability_0"]), float(row["probability_1"])] for row in rows])
        assert np.log(chances[:, 1] / chances[:, 0]) == pytest.approx(expected[:, 1] - expected[:, 0], abs=1e-3)
        assert [int(row["class"]) for row in rows] == expected.argmax(1).tolist()


def test_a_model_of_pairs_predicts_pairs_and_another_one_none(exported, tmp_path, capsys):
    kind, task, _, directory = exported
    (tmp_path / "x.fa").write_text(">a\nACGTACGTnn\n")
    command = ["predict", "--model", str(directory), "--out", str(tmp_path / "out.csv"), "--input"]
    if kind == "pairs":
        assert run([*command, str(tmp_path / "x.fa")]) == 2
        assert "is FASTA, and " in capsys.readouterr().err
        assert run([*command, str(task / "test.csv"), "--columns", "first"]) == 2
        assert "was trained on pairs (first and second); --columns first: name 2" in capsys.readouterr().err
        assert "tokenizer([text], [text]" in (directory / "README.md").read_text()
    else:
        assert run([*command, str(tmp_path / "x.fa")]) == 0
        assert "x.fa: 1 sequences have letters other than A, C, G, T" in capsys.readouterr().err
        assert run([*command, str(task / "test.csv"), "--columns", "sequence", "label"]) == 2
        assert "was trained on single sequences" in capsys.readouterr().err


def test_the_model_card_says_what_it_is(exported):
    kind, _, results, directory = exported
    card = (directory / "README.md").read_text()
    (path,) = results.rglob("seed-0.json")
    result = json.loads(path.read_text())
    assert f"| {result['test'][result['metric']]:.4f} |" in card
    assert result["data"]["train"]["sha256"] in card
    assert ("with LoRA" in card) == (kind == "lora") and ("Regression;" in card) == (kind == "regression")


def test_a_finished_run_is_done_again_for_its_export_alone(planted, huggingface, tmp_path, capsys):
    command = ["run", "--model", str(huggingface), "--task", str(planted), "--out", str(tmp_path / "results"), *QUICK]
    assert run(command) == 0
    (path,) = (tmp_path / "results").rglob("seed-0.json")
    before = json.loads(path.read_text())
    assert run([*command, "--export", str(tmp_path / "hf")]) == 0
    after = json.loads(path.read_text())
    assert (tmp_path / "hf" / "config.json").is_file() and before["test"] == after["test"]
    assert run([*command, "--export", str(tmp_path / "hf")]) == 0
    assert "done already" in capsys.readouterr().err
    assert run([*command, "--seed", "1", "--export", str(tmp_path / "hf")]) == 2  # another run's model is there
    assert "hf: exists and is not an empty directory" in capsys.readouterr().err
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").touch()
    assert run([*command, "--export", str(tmp_path / "busy")]) == 2
    assert "busy: exists and is not an empty directory" in capsys.readouterr().err
    assert run([*command, "--method", "probe", "--export", str(tmp_path / "probe")]) == 2


def test_fasta_in_windows_and_what_does_not_fit(planted, huggingface, tmp_path, capsys):
    command = ["run", "--model", str(huggingface), "--task", str(planted), "--out", str(tmp_path / "results"), *QUICK]
    assert run([*command, "--export", str(tmp_path / "hf")]) == 0
    fasta, out = tmp_path / "x.fa", tmp_path / "out.csv"
    fasta.write_text(">one\n" + "acgt" * 30 + "\n>two\nGGCC\n")
    predict = ["predict", "--model", str(tmp_path / "hf"), "--input", str(fasta), "--out", str(out)]
    assert run([*predict, "--window", "50"]) == 0
    assert [row["name"] for row in predictions(out)] == ["one:0-50", "one:50-100", "one:100-120", "two"]
    capsys.readouterr()
    fasta.write_text(">long\n" + "ACGT" * 3000 + "\n")
    assert run(predict) == 2
    assert "record 'long'" in capsys.readouterr().err
    assert [row["name"] for row in predictions(out)][-1] == "two"  # the file of before is whole
    assert run(["predict", "--model", str(huggingface), "--input", str(fasta), "--out", str(out)]) == 2
    assert "not the config of a fine-tuned model" in capsys.readouterr().err
    weights = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "classifier.weight": np.zeros((2, 31), np.float32)}, weights)
    assert run(predict) == 2
    assert "classifier.weight is [2, 31], its configuration says [2, 32]" in capsys.readouterr().err
