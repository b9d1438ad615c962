from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from finetune.metrics import Objective, correlations, cross_entropy, scores


def test_scores_of_a_known_confusion_table():
    # 4 true positives, 1 false negative, 2 false positives, 3 true negatives
    labels = np.array([1] * 5 + [0] * 5)
    predicted = np.array([1, 1, 1, 1, 0, 1, 1, 0, 0, 0])
    result = scores(np.eye(2, dtype=np.float32)[predicted], labels)
    assert result["mcc"] == pytest.approx((4 * 3 - 2 * 1) / math.sqrt(6 * 5 * 5 * 4))
    assert result["accuracy"] == pytest.approx(0.7)
    assert result["f1_macro"] == pytest.approx((2 * 4 / (2 * 4 + 2 + 1) + 2 * 3 / (2 * 3 + 1 + 2)) / 2)


def test_cross_entropy_is_torchs():
    logits = np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32) * 30
    labels = np.random.default_rng(1).integers(0, 9, 50)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert cross_entropy(logits, labels) == pytest.approx(float(expected), rel=1e-12)
    assert cross_entropy(np.full((2, 2), np.nan, np.float32), np.array([0, 1])) != 0  # nan stays nan


def test_one_class_or_one_number_throughout_is_a_collapse():
    assert Objective(2).collapsed(np.array([[2, 1], [5, 4]], dtype=np.float32))
    assert not Objective(2).collapsed(np.array([[2, 1], [4, 5]], dtype=np.float32))
    assert Objective(1, 0.0, 10.0).collapsed(np.array([[2.0], [2.001]], dtype=np.float32))
    assert not Objective(1, 0.0, 1e-3).collapsed(np.array([[2.0], [2.001]], dtype=np.float32))


def test_correlations_are_scipys_and_0_where_nothing_varies():
    random = np.random.default_rng(0)
    labels = random.normal(size=40)
    predicted = (np.exp(labels) + 0.1 * random.normal(size=40)).astype(np.float32)
    found = correlations(predicted, labels)
    assert found["pearson"] == pytest.approx(pearsonr(predicted, labels).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(spearmanr(predicted, labels).statistic, abs=1e-6)
    assert correlations(np.ones(40, np.float32), labels)["pearson"] == 0


def test_a_regression_is_standardized_on_train_and_scored_in_the_labels_unit():
    objective = Objective.of(1, np.array([10.0, 30.0]))
    assert objective.targets(np.array([10.0, 20.0])).tolist() == [-1, 0]
    assert objective.outputs(np.array([[-1.0], [0.5]], dtype=np.float32)).tolist() == [[10], [25]]
    result = objective.evaluate(np.array([[12.0], [30.0]], dtype=np.float32), np.array([10.0, 30.0]))
    assert (result["mse"], result["loss"]) == (2.0, 0.02)


def test_numbers_far_from_0_keep_their_correlation():
    random = np.random.default_rng(0)
    labels = 1e7 + random.normal(size=200)
    objective = Objective.of(1, labels)
    raw = (objective.targets(labels) + random.normal(size=200).astype(np.float32))[:, None]
    expected = pearsonr(raw[:, 0].astype(np.float64), labels).statistic
    assert objective.evaluate(objective.outputs(raw), labels)["pearson"] == pytest.approx(expected, abs=1e-6)
