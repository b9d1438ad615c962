from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from finetune.metrics import collapsed, cross_entropy, scores


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


def test_one_class_throughout_is_a_collapse():
    assert collapsed(np.array([[2, 1], [5, 4]], dtype=np.float32))
    assert not collapsed(np.array([[2, 1], [4, 5]], dtype=np.float32))
