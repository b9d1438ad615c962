"""The speed comparison runs on the same batches, counts what each model computes, and says what is missing."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from data_prep.cli import InputError
from pretrain import bench_huggingface
from pretrain.bench import paired_ratio
from pretrain.bench_sweep import add_efficiency, parse
from pretrain.loader import MaskedBatch
from pretrain.model import ModelConfig, Packed

SIZES = [
    "model.hidden_size=16",
    "model.intermediate_size=12",
    "model.num_attention_heads=2",
    "train.micro_batch_size=2",
]


def bench(*argv):
    """The verb in a process of its own: it joins a process group."""
    command = [sys.executable, "-m", "pretrain", "bench", "tiny", *SIZES, "--steps", "1", "--threads", "1", "--json", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compared():
    return bench()


def test_it_compares_steps_of_the_same_real_tokens(compared):
    assert compared.returncode == 0, compared.stderr
    assert len(compared.stdout.splitlines()) == 1  # stdout is for the result
    result = json.loads(compared.stdout)
    speed, seconds = result["tokens_per_second"], result["step_seconds"]
    assert set(speed) == {"ours", "huggingface", "huggingface_masked_logits"}
    assert result["ratio_huggingface"] == pytest.approx(speed["ours"] / speed["huggingface"])
    assert speed["ours"] * seconds["ours"] == pytest.approx(speed["huggingface"] * seconds["huggingface"])
    products = result["matrix_flops_per_step"]
    assert products["ours"] < products["huggingface_masked_logits"] < products["huggingface"]
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert 0 < result["shares"]["matrix_products"] < 1
    largest = [share for _, share in result["largest_shares"]]
    assert largest == sorted(largest, reverse=True) and 0.5 < sum(largest) < 1.001
    assert "aten::mm" in dict(result["largest_shares"])
    assert min(result["parts_seconds"].values()) >= 0 and set(result["parts_seconds"]) >= {"data", "forward", "backward"}
    assert "ours / it" in compared.stderr


def test_a_ratio_is_of_steps_on_the_same_batch():
    """The machine was slow for both in the second; medians apart would say 1.0."""
    assert paired_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 3.0]) == 2.0


def test_bad_numbers():
    done = bench("--steps", "0")
    assert done.returncode == 2 and "--steps 0" in done.stderr


def test_without_transformers_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'extra "test"'):
        bench_huggingface.build(ModelConfig(), 128, torch.device("cpu"), torch.float32)


def test_padded_rows_hold_the_same_tokens_and_labels():
    packed = Packed(torch.tensor([1, 9, 2, 1, 8, 7, 2]), torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    batch = MaskedBatch(packed, torch.tensor([1, 5]), torch.tensor([30, 31]), torch.arange(2).numpy())
    ids_bs, attention_bs, labels_bs = bench_huggingface.pad(batch, torch.device("cpu"))
    assert ids_bs.tolist() == [[1, 9, 2, bench_huggingface.PAD], [1, 8, 7, 2]]
    assert attention_bs.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert labels_bs.tolist() == [[-100, 30, -100, -100], [-100, -100, 31, -100]]


@pytest.mark.parametrize("name", bench_huggingface.NAMES[:2])
@pytest.mark.parametrize("masters", [False, True])
def test_their_step_trains(name, masters):
    config = ModelConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    dtype = torch.bfloat16 if masters else torch.float32
    model = bench_huggingface.build(config, 8, torch.device("cpu"), dtype)
    assert model.config.intermediate_size == 12
    before = [parameter.clone() for parameter in model.bert.parameters()]
    step = bench_huggingface.stepper(name, model, masters)
    padded = torch.randint(5, 20, (2, 6)), torch.ones(2, 6, dtype=torch.int64), torch.full((2, 6), -100)
    padded[2][:, 3] = 7
    for _ in range(20):  # a bf16 weight moves when its fp32 master has moved far enough
        step([padded, padded])
    moved = [not torch.equal(a, b) for a, b in zip(before, model.bert.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_sweep_writes_rows_and_a_picture_and_keeps_settings_that_fail(tmp_path):
    launch = f"{sys.executable}"  # one rank, no launcher
    done = bench("--sweep", "micro=2,4", "stage=1,9", "--launch", launch, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(row["stage"], row["micro"]) for row in rows] == [("1", "2"), ("1", "4"), ("9", "2"), ("9", "4")]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows[:2])
    assert all("zero_stage" in row["error"] and not row["tokens_per_second"] for row in rows[2:])
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_axes_of_a_sweep():
    assert parse(["micro=8,16", "ranks=2"], 0, 32) == {"nodes": [1], "ranks": [2], "stage": [0], "micro": [8, 16]}
    assert parse(["stage=1,2"], 0, 32) == {"nodes": [1], "ranks": [1], "stage": [1, 2], "micro": [32]}
    with pytest.raises(InputError, match="--sweep batch=2"):
        parse(["batch=2"], 1, 16)


def test_efficiency_is_relative_to_the_fewest_ranks():
    rows = [
        {"nodes": 1, "stage": 1, "micro": 8, "ranks": ranks, "tokens_per_second": speed, "tokens_per_second_per_rank": each}
        for ranks, speed, each in ((4, 300.0, 75.0), (1, 100.0, 100.0), (2, None, None))
    ]
    add_efficiency(rows)
    assert [row["efficiency"] for row in rows] == [0.75, 1.0, None]
