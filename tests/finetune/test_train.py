from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import finetune.train
from data_prep.cli import InputError
from finetune.batches import micro_batches
from finetune.metrics import cross_entropy, scores
from finetune.model import build
from finetune.tasks import Settings
from finetune.train import batches, predict, rate_factor, total_steps, train

CPU = torch.device("cpu")
QUICK = Settings(learning_rate=3e-3, epochs=None, max_steps=12, warmup_steps=2, eval_every=5, batch_size=16)


def test_the_run_ends_at_whichever_limit_comes_first():
    assert total_steps(100, Settings(epochs=3, batch_size=32, warmup_steps=0)) == 12  # the last batch counts
    assert total_steps(100, Settings(epochs=3, max_steps=5, warmup_steps=0)) == 5
    assert total_steps(100, Settings(epochs=3, max_steps=50, warmup_steps=0)) == 12
    assert total_steps(100, Settings(epochs=None, max_steps=1000)) == 1000
    with pytest.raises(InputError, match="--warmup-steps 50: the run has only 12 steps"):
        total_steps(100, Settings(epochs=3))
    with pytest.raises(InputError, match="neither"):
        total_steps(100, Settings(epochs=None, max_steps=None))


def test_the_rate_rises_and_falls_linearly():
    factors = [rate_factor(step, 4, 12) for step in range(13)]
    assert factors == pytest.approx([0, 0.25, 0.5, 0.75, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert rate_factor(0, 0, 10) == 1


def test_every_epoch_takes_every_row_once_at_a_position_of_its_own():
    source = batches(0, 10, Settings(batch_size=4))
    taken = [next(source) for _ in range(6)]
    assert [len(rows) for _, rows, _ in taken] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate([rows for _, rows, _ in taken[:3]])) == list(range(10))
    assert [epoch for epoch, _, _ in taken] == [0, 0, 0, 1, 1, 1]
    assert np.concatenate([positions for _, _, positions in taken]).tolist() == list(range(20))


def test_a_planted_signal_is_learnt_and_the_best_weights_are_kept(small_config, planted_tokens):
    settings = Settings(learning_rate=3e-3, epochs=None, max_steps=90, warmup_steps=10, eval_every=20)
    model = build(small_config, 2, None, 0, "random")
    trained = train(model, planted_tokens["train"], planted_tokens["dev"], settings, 0, CPU)
    dev_losses = {entry["step"]: entry["dev_loss"] for entry in trained.curves}
    assert list(dev_losses) == [20, 40, 60, 80, 90]
    assert trained.best_step == min(dev_losses, key=dev_losses.__getitem__)
    dev_logits = predict(model, planted_tokens["dev"], settings, CPU)
    assert cross_entropy(dev_logits, planted_tokens["dev"].labels) == dev_losses[trained.best_step]
    test = scores(predict(model, planted_tokens["test"], settings, CPU), planted_tokens["test"].labels)
    assert test["mcc"] > 0.5


def _weights(config, tokens, settings, seed=0):
    model = build(config, 2, None, 0, "random")
    trained = train(model, tokens["train"], tokens["dev"], settings, seed, CPU)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), trained


def test_the_same_seed_gives_the_same_bits(small_config, planted_tokens):
    first, trained_first = _weights(small_config, planted_tokens, QUICK)
    second, trained_second = _weights(small_config, planted_tokens, QUICK)
    assert torch.equal(first, second)
    assert trained_first.curves == trained_second.curves
    assert [entry["step"] for entry in trained_first.curves] == [5, 10, 12]
    assert not torch.equal(first, _weights(small_config, planted_tokens, QUICK, seed=1)[0])


def test_cutting_a_batch_changes_rounding_only(small_config, planted_tokens, monkeypatch):
    settings = QUICK.model_copy(update={"max_steps": 4, "eval_every": 100})
    whole, _ = _weights(small_config, planted_tokens, settings)
    monkeypatch.setattr(finetune.train, "micro_batches", partial(micro_batches, budget=100))
    cut, _ = _weights(small_config, planted_tokens, settings)
    assert (whole - cut).abs().max() < 1e-4  # AdamW's first steps turn rounding of tiny gradients into parts of the rate
    assert not torch.equal(whole, cut)


def test_bf16_trains(small_config, planted_tokens):
    wide, _ = _weights(small_config, planted_tokens, QUICK)
    narrow, trained = _weights(small_config, planted_tokens, QUICK.model_copy(update={"dtype": "bf16"}))
    assert narrow.dtype == torch.float32
    assert not torch.equal(wide, narrow)
    assert trained.curves[-1]["train_loss"] < 1.5


def test_a_loss_that_is_not_a_number_ends_the_run(small_config, planted_tokens):
    model = build(small_config, 2, None, 0, "random")
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the training loss is nan at step 5 of 12"):
        train(model, planted_tokens["train"], planted_tokens["dev"], QUICK, 0, CPU)
