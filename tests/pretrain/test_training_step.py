"""The training step: that the host doesn't wait in it, and what it sends to other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from tests.commands import ENVIRONMENT, metrics, pretrain, python

WORKERS = Path(__file__).parent


@pytest.fixture(scope="module")
def trials() -> list[dict[str, Any]]:
    done = python("-m", "tests.pretrain.step_worker", ranks=2)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_host_reads_no_number_of_the_device_in_a_step(trials: list[dict[str, Any]]) -> None:
    # Stage 3 is left out: DeepSpeed asks there whether a number on the host is finite, and a CPU can't tell the two apart.
    assert {trial["stage"] for trial in trials} == {0, 1, 2, 3}
    assert [trial for trial in trials if trial["stage"] < 3 and trial["reads"]] == []


def test_gradients_are_reduced_once_a_step_below_stage_2(trials: list[dict[str, Any]]) -> None:
    for trial in trials:
        assert (trial["micro"] == 0) == (trial["stage"] < 2), trial
        if trial["stage"] < 3 and trial["optimizer"] == "adamw":
            # Gradients, the sums of the step, and from stage 1 on the weights: a model of one bucket.
            assert trial["boundary"] == (2 if trial["stage"] == 0 else 3), trial


def test_what_is_logged_does_not_depend_on_how_often(tiny_config: list[str], tmp_path: Path) -> None:
    """Losses of logged steps, the bad steps between them, and everything that a checkpoint has of them."""
    records, bad = [], []
    for name, every in [("each", 1), ("some", 3)]:
        run_dir = tmp_path / name
        arguments = [*tiny_config, f"run_dir={run_dir}", f"train.log_every={every}", "validation.every=0"]
        done = python(WORKERS / "bad_worker.py", "loss", "2,5", "train", *arguments, ranks=2)
        assert done.returncode == 0, done.stderr
        records.append({record["step"]: record for record in metrics(run_dir)})
        bad.append([json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()])
        assert checkpoint.Checkpoint(checkpoint.step_path(run_dir, 8)).state["optimizer_step"] == 6
    each, some = records
    assert list(some) == [1, 3, 6, 8]
    for step, record in some.items():
        for key in ("loss", "masked_accuracy", "grad_norm", "learning_rate"):
            assert record[key] == each[step][key]
    assert some[3]["skipped_steps"] == 1 and some[6]["skipped_steps"] == 1 and "skipped_steps" not in some[8]
    assert bad[0] == bad[1] and [record["step"] for record in bad[0]] == [2, 5]


def test_a_run_of_bad_steps_is_found_when_it_is_read(tiny_config: list[str], tmp_path: Path) -> None:
    """Between two logged steps, with good ones after it: the run ends all the same, and names the step to go back to."""
    settings = [f"run_dir={tmp_path}", "train.log_every=100", "checkpoint.save_every=2", "bad_steps.stop_after=3"]
    done = python(WORKERS / "bad_worker.py", "loss", "3,4,5", "train", *tiny_config, "validation.every=7", *settings)
    assert done.returncode == 1 and "step 5: 3 bad steps in a row" in done.stderr and "--from-step 2" in done.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()] == [3, 4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_it(tiny_config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "0")
    for stage, optimizer in [(1, "adamw"), (2, "adamw"), (1, "lamb")]:
        settings = [f"run_dir={tmp_path / f'{optimizer}-{stage}'}", "train.dtype=bf16", f"deepspeed.zero_stage={stage}"]
        settings += [f"optimizer.name={optimizer}", "train.log_every=4", "validation.every=0"]
        done = python(WORKERS / "unsynchronised_worker.py", "train", *tiny_config, *settings)
        assert done.returncode == 0, done.stderr


def test_a_batch_that_grows_goes_on_bit_for_bit(tiny_config: list[str], tmp_path: Path) -> None:
    """Stopped inside the warm-up, on two ranks: one micro batch each at first, three at last."""
    growing = ["train.batch_warmup.start=2", "train.batch_warmup.steps=4", "train.max_steps=6", "validation.every=0"]
    common = ["train", *tiny_config, *growing, "train.micro_batch_size=2", "checkpoint.keep_last=9"]
    pretrain(*common, f"run_dir={tmp_path / 'whole'}", ranks=2)
    pretrain(*common, f"run_dir={tmp_path / 'parts'}", "train.stop_at_step=2", ranks=2)
    pretrain(*common, f"run_dir={tmp_path / 'parts'}", ranks=2)
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [record["loss"] for record in parts] == [record["loss"] for record in whole]
    for step, position in [(2, 2 + 4), (6, 2 + 4 + 6 + 8 + 11 + 11)]:
        assert checkpoint.Checkpoint(checkpoint.step_path(tmp_path / "parts", step)).state["loader"]["position"] == position
