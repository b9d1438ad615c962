from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

import finetune.train
from data_prep.cli import InputError
from finetune.batches import micro_batches, pack
from finetune.lora import TARGETS, add_lora, merge_lora
from finetune.metrics import Objective, cross_entropy, scores
from finetune.model import build
from finetune.tasks import Settings
from finetune.train import batches, embed, predict, rate_factor, total_steps, train
from pretrain.model import Encoder

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
    settings = Settings(learning_rate=3e-3, epochs=None, max_steps=90, warmup_steps=10, eval_every=20, best_by="loss")
    model = build(small_config, 2, None, 0, "random")
    trained = train(model, planted_tokens["train"], planted_tokens["dev"], Objective(2), settings, 0, CPU)
    dev_losses = {entry["step"]: entry["dev_loss"] for entry in trained.curves}
    assert list(dev_losses) == [20, 40, 60, 80, 90]
    assert trained.best_step == min(dev_losses, key=dev_losses.__getitem__)
    dev_logits = predict(model, planted_tokens["dev"], Objective(2), settings, CPU)
    assert cross_entropy(dev_logits, planted_tokens["dev"].labels) == dev_losses[trained.best_step]
    test = scores(predict(model, planted_tokens["test"], Objective(2), settings, CPU), planted_tokens["test"].labels)
    assert test["mcc"] > 0.5


def _weights(config, tokens, settings, seed=0):
    model = build(config, 2, None, 0, "random")
    trained = train(model, tokens["train"], tokens["dev"], Objective(2), settings, seed, CPU)
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
        train(model, planted_tokens["train"], planted_tokens["dev"], Objective(2), QUICK, 0, CPU)


@pytest.mark.parametrize(
    ("best_by", "expected"),
    [("loss", 4), ("score", 3)],  # of equal scores the lower loss
)
def test_the_kept_weights_are_those_of_the_best_evaluation(small_config, planted_tokens, monkeypatch, best_by, expected):
    evaluations = iter([(0.9, 0.1), (0.8, 0.5), (0.7, 0.5), (0.5, 0.4), (0.6, 0.3), (0.6, 0.3)])

    def evaluate(self, outputs, labels):
        loss, mcc = next(evaluations)
        return {"loss": loss, "mcc": mcc}

    monkeypatch.setattr(Objective, "evaluate", evaluate)
    settings = QUICK.model_copy(update={"max_steps": 6, "eval_every": 1, "best_by": best_by})
    model = build(small_config, 2, None, 0, "random")
    trained = train(model, planted_tokens["train"], planted_tokens["dev"], Objective(2), settings, 0, CPU)
    assert (trained.best_step, trained.steps, trained.stopped_early) == (expected, 6, False)
    same = build(small_config, 2, None, 0, "random")
    evaluations = iter([(0.9, 0.1)] * 9)
    stopped = QUICK.model_copy(update={"max_steps": 6, "eval_every": 1, "patience": 2})
    trained = train(same, planted_tokens["train"], planted_tokens["dev"], Objective(2), stopped, 0, CPU)
    assert (trained.best_step, trained.steps, trained.stopped_early) == (1, 3, True)


def test_numbers_are_learnt_in_the_unit_of_their_labels(small_config, planted_tokens):
    def with_numbers(split):
        tokens = planted_tokens[split]
        share = np.add.reduceat((tokens.ids == 6) | (tokens.ids == 7), tokens.starts[:-1]) / tokens.lengths
        return dataclasses.replace(tokens, labels=1000 + 50 * share)

    train_set, dev_set, test_set = map(with_numbers, ("train", "dev", "test"))
    objective = Objective.of(1, train_set.labels)
    settings = Settings(learning_rate=3e-3, epochs=None, max_steps=100, warmup_steps=10, eval_every=50)
    model = build(small_config, 1, None, 0, "random", "mean")
    train(model, train_set, dev_set, objective, settings, 0, CPU)
    result = objective.evaluate(objective.outputs(predict(model, test_set, objective, settings, CPU)), test_set.labels)
    assert result["pearson"] > 0.9 and result["r2"] > 0.7
    assert result["mse"] < 0.5 * test_set.labels.var()


def test_lora_trains_its_updates_and_the_head_and_leaves_plain_matrices(small_config, planted_tokens):
    model = build(small_config, 2, None, 0, "random")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = Settings(method="lora", learning_rate=1e-2, epochs=None, max_steps=60, warmup_steps=5, eval_every=30)
    tuner = add_lora(model, settings, 0)
    train(model, planted_tokens["train"], planted_tokens["dev"], Objective(2), settings, 0, CPU)
    test = planted_tokens["test"]
    wrapped = predict(model, test, Objective(2), settings, CPU)
    assert merge_lora(tuner) is model
    assert np.abs(wrapped - predict(model, test, Objective(2), settings, CPU)).max() < 1e-4
    assert scores(wrapped, test.labels)["mcc"] > 0.5
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    heads = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    matrices = {name for name in before if name.split(".")[-2] in TARGETS and name.endswith("weight")}
    assert changed == heads | matrices and len(matrices) == 6


def test_lora_that_wraps_too_little_is_an_error(small_config, monkeypatch):
    monkeypatch.setattr("finetune.lora.TARGETS", ("Wqkv", "query"))
    with pytest.raises(RuntimeError, match="LoRA wrapped 2 of 4 matrices"):
        add_lora(build(small_config, 2, None, 0, "random"), Settings(method="lora"), 0)


def test_mean_pooling_is_the_mean_over_each_sequences_own_tokens(small_config, planted_tokens):
    tokens = planted_tokens["test"]
    model = build(small_config, 2, None, 0, "random", "mean")
    rows = np.array([3, 0, 11])
    batch = pack(tokens, rows)
    with torch.inference_mode():
        states = Encoder.forward(model.bert, batch)
    bounds = batch.cu_seqlens.tolist()
    expected = torch.stack([states[start:stop].mean(0) for start, stop in pairwise(bounds)])
    assert np.abs(embed(model, tokens, Settings(), CPU)[rows] - expected.numpy()).max() < 1e-5
