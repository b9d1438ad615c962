from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from finetune.baselines import base_tokenizer, build_cnn, kmer_counts
from finetune.batches import pack
from finetune.data import Rows, read_task
from finetune.linear import fit_linear
from finetune.metrics import Objective, scores
from finetune.tasks import Settings
from finetune.tokens import tokenize
from finetune.train import predict, train

CPU = torch.device("cpu")


def rows_of(*sequences: str, seconds: list[str] | None = None) -> Rows:
    count = len(sequences)
    return Rows("x.csv", list(sequences), np.zeros(count, np.int64), np.arange(count), "", seconds)  # type: ignore[arg-type]


def test_words_are_counted_by_hand():
    counts = kmer_counts(rows_of("ACGTAC", "acnac", "T")).toarray()
    assert counts.shape == (3, sum(4**k for k in range(1, 7)))
    singles, pairs = counts[:, :4], counts[:, 4:20]
    assert singles * [[6], [5], [1]] == pytest.approx(np.array([[2, 2, 1, 1], [2, 2, 0, 0], [0, 0, 0, 1]]))
    dinucleotides = ["".join(pair) for pair in product("ACGT", repeat=2)]
    found = {name: count for name, count in zip(dinucleotides, (pairs[0] * 6).tolist(), strict=True) if count}
    assert found == pytest.approx({"AC": 2, "CG": 1, "GT": 1, "TA": 1})
    assert {name for name, count in zip(dinucleotides, pairs[1], strict=True) if count} == {"AC"}  # nothing across the N
    assert counts[0, -(4**6) :].sum() == pytest.approx(1 / 6) and counts[1, -(4**6) :].sum() == 0


def test_the_second_of_a_pair_has_columns_of_its_own():
    counts = kmer_counts(rows_of("AAAA", seconds=["CCCC"])).toarray()
    half = counts.shape[1] // 2
    assert counts[0, 0] == 1 and counts[0, 1] == 0 and counts[0, half] == 0 and counts[0, half + 1] == 1


def test_logistic_regression_on_words_learns_and_its_penalty_is_chosen_on_dev(planted):
    task = read_task(planted)
    features = {split: kmer_counts(rows) for split, rows in task.splits.items()}
    labels = {split: rows.labels for split, rows in task.splits.items()}
    outputs, curves, penalty = fit_linear(features, labels, Objective(2), "score")
    assert scores(outputs["test"], labels["test"])["mcc"] > 0.6
    best = max(curves, key=lambda entry: (entry["dev_mcc"], -entry["dev_loss"]))
    assert best["penalty"] == penalty
    assert Objective(2).evaluate(outputs["dev"], labels["dev"])["loss"] == best["dev_loss"]


@pytest.mark.parametrize("classes", [1, 3])
def test_numbers_and_several_classes_are_fitted(classes):
    random = np.random.default_rng(0)
    features = {split: random.normal(size=(300, 5)) for split in ("train", "dev", "test")}
    if classes == 1:
        labels = {split: 5 + 3 * values[:, 0] for split, values in features.items()}
    else:
        labels = {split: values[:, :3].argmax(1) for split, values in features.items()}
    objective = Objective.of(classes, labels["train"])
    outputs, _, _ = fit_linear(features, labels, objective, "loss")
    result = objective.evaluate(outputs["test"], labels["test"])
    assert result[objective.score] > 0.8
    if classes == 1:
        assert result["mse"] < 0.1 * labels["test"].var()  # in the unit of the labels


def test_the_network_learns_and_a_sequence_does_not_see_its_batch(planted):
    task, tokenizer = read_task(planted), base_tokenizer()
    size = tokenizer.get_vocab_size()
    tokens = {split: tokenize(rows, tokenizer, size, None) for split, rows in task.splits.items()}
    model = build_cnn(size, 2, 0)
    settings = Settings(learning_rate=1e-3, epochs=None, max_steps=60, warmup_steps=5, eval_every=30)
    train(model, tokens["train"], tokens["dev"], Objective(2), settings, 0, CPU)
    whole = predict(model, tokens["test"], Objective(2), settings, CPU)
    assert scores(whole, tokens["test"].labels)["mcc"] > 0.5
    with torch.inference_mode():
        alone = [model(pack(tokens["test"], np.array([row])))[0].numpy() for row in range(20)]
    assert np.abs(whole[:20] - np.stack(alone)).max() < 1e-5
    first, again, other = (build_cnn(size, 2, seed).embedding.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
