"""Bad numbers: which steps are left out, that they change nothing, and what is written down about them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.bad_steps import BadSteps
from pretrain.config import BadStepsConfig
from tests.commands import exit_status, metrics, pretrain, python
from tests.pretrain.states import state_of

WORKER = Path(__file__).parent / "bad_worker.py"


def judge(bad: BadSteps, loss: float, norm: float) -> str | None:
    """As training does it: the verdict on the device, and what the host makes of it later."""
    is_bad, _, median = bad.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64)).tolist()
    return bad.reason(loss, norm, median) if is_bad else None


def new(config: BadStepsConfig | None = None, state: dict[str, Any] | None = None) -> BadSteps:
    return BadSteps(config or BadStepsConfig(), torch.device("cpu"), state)


def judged(config: BadStepsConfig, norms: list[float]) -> list[bool]:
    bad = new(config)
    return [judge(bad, 1.0, norm) is not None for norm in norms]


def test_what_is_not_finite_is_bad_from_the_first_step_on() -> None:
    bad = new()
    assert judge(bad, math.nan, 1.0) == "the loss is nan" and judge(bad, math.inf, 1.0) == "the loss is inf"
    assert judge(bad, 1.0, math.nan) == judge(bad, 1.0, math.inf) == "a gradient is not finite"
    assert bad.state() == {"norms": [], "in_a_row": 4}
    assert judge(bad, 1.0, 1e9) is None and bad.state() == {"norms": [1e9], "in_a_row": 0}


def test_a_spike_is_measured_by_the_median_of_good_steps() -> None:
    config = BadStepsConfig(norm_factor=4.0, window=3)
    assert judged(config, [9.0, 1.0, 2.0, 8.0, 8.1]) == [False, False, False, False, True]  # medians 2 and 2
    assert judged(config, [1.0] * 3 + [5.0] * 9) == [False] * 3 + [True] * 9  # bad ones do not move it
    assert judged(config, [1.0, 1.0, 9.0]) == [False] * 3  # not before the window is full
    assert judged(BadStepsConfig(norm_factor=0, window=1), [1.0, 1e30]) == [False, False]


def test_the_judgement_goes_on_where_a_checkpoint_left_it() -> None:
    config = BadStepsConfig(norm_factor=4.0, window=3)
    for norms in ((0.1, 0.2, 0.3, 9.0), (0.5, 0.4, 0.1, 0.2, 0.3, 9.0)):  # the window full once, and wrapped round
        first = new(config)
        for norm in norms:
            judge(first, 1.0, norm)
        state = json.loads(json.dumps(first.state()))
        assert state == {"norms": [0.1, 0.2, 0.3], "in_a_row": 1}
        again = new(config, state)
        assert judge(again, 1.0, 0.81) == "the gradient norm 0.81 is over 4 times the median 0.2"
        assert judge(again, 1.0, 0.79) is None and again.state() == {"norms": [0.2, 0.3, 0.79], "in_a_row": 0}
        # A shorter window keeps the newest.
        assert new(BadStepsConfig(window=2), state).state()["norms"] == [0.2, 0.3]


def test_of_an_even_window_the_median_is_the_middle_of_two() -> None:
    assert judged(BadStepsConfig(norm_factor=2.0, window=4), [1.0, 4.0, 2.0, 3.0, 5.1]) == [False] * 4 + [True]
    assert judged(BadStepsConfig(norm_factor=2.0, window=4), [1.0, 4.0, 2.0, 3.0, 4.9]) == [False] * 5


@pytest.mark.parametrize(
    ("stage", "dtype", "kind"), [(0, "fp32", "loss"), (1, "bf16", "gradient"), (2, "fp32", "spike"), (3, "bf16", "loss")]
)
def test_a_bad_step_changes_no_bit_of_weights_moments_and_step_counter(
    tiny_config: list[str], tmp_path: Path, stage: int, dtype: str, kind: str
) -> None:
    settings = [f"deepspeed.zero_stage={stage}", f"train.dtype={dtype}", "train.max_steps=5", "checkpoint.save_every=1"]
    settings += ["checkpoint.keep_last=9", "bad_steps.window=2", f"run_dir={tmp_path}"]
    done = python(WORKER, kind, "4", "train", *tiny_config, *settings, "train.stop_at_step=4", ranks=2)
    assert done.returncode == 0, done.stderr
    states = {step: state_of(tmp_path, step) for step in (2, 3, 4)}
    assert any(not torch.equal(states[2][name], states[3][name]) for name in states[2])
    assert all(torch.equal(states[3][name], states[4][name]) for name in states[3])
    manifests = [checkpoint.Checkpoint(checkpoint.step_path(tmp_path, step)) for step in (3, 4)]
    assert [saved.state["optimizer_step"] for saved in manifests] == [3, 3]
    assert [saved.state["loader"]["position"] for saved in manifests] == [33, 44]

    last = metrics(tmp_path)[3]
    assert last["skipped_steps"] == 1 and (last["loss"] is None) == (kind == "loss")
    (record,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert record["step"] == 4 and record["positions"] == [33, 44]
    # The second of two ranks has rows 5 to 10 in micro batches of 3; the loss names its last one, a gradient nobody.
    assert record["suspects"] == (kind == "loss") and len(record["sequences"]) == (3 if kind == "loss" else 11)

    # Resumed there, and in the life that met it, the run goes on alike: nothing of the bad step is left in DeepSpeed.
    pretrain("train", *tiny_config, *settings, ranks=2)
    resumed = state_of(tmp_path, 5)
    assert checkpoint.Checkpoint(checkpoint.step_path(tmp_path, 5)).state["optimizer_step"] == 4
    if dtype == "bf16":
        for step in (4, 5):
            shutil.rmtree(checkpoint.step_path(tmp_path, step))
        done = python(WORKER, kind, "4", "train", *tiny_config, *settings, ranks=2)
        assert done.returncode == 0, done.stderr
        went_on = state_of(tmp_path, 5)
        assert all(torch.equal(went_on[name], resumed[name]) for name in went_on)


def test_too_many_in_a_row_stop_the_run_and_name_the_step_to_go_back_to(tiny_config: list[str], tmp_path: Path) -> None:
    settings = [*tiny_config, f"run_dir={tmp_path}", "checkpoint.save_every=2", "bad_steps.stop_after=3"]
    done = python(WORKER, "loss", "4,5,6", "train", *settings)
    assert done.returncode == 1 and "step 6: 3 bad steps in a row" in done.stderr
    assert "--from-step 2" in done.stderr
    assert exit_status(tmp_path) == 1 and checkpoint.steps(tmp_path) == [2]  # nothing is saved among bad steps
    # The data and the numbers were bad, not the run: without them it goes on.
    pretrain("train", *settings, "--from-step", "2", "optimizer.learning_rate=1e-3")
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 9))
    assert (tmp_path / "bad_steps.jsonl").read_text() == ""
