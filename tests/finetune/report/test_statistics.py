"""Metrics from counts are scikit-learn's; intervals cover, p values are small for a difference and not for none."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from finetune.metrics import correlations
from finetune.report import statistics
from finetune.report.statistics import draw_seeds, holm, interval, p_value, run_replicates, weighted_score


def classes_of(count: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels_n = random.integers(count, size=rows)
    return labels_n, np.where(random.random(rows) < 0.5, labels_n, random.integers(count, size=rows))


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        classes_of(2, 50, 0),
        classes_of(3, 7, 1),
        classes_of(25, 400, 2),
        classes_of(25, 10, 3),  # most classes are nowhere
        ([0, 1, 1, 0], [1, 1, 1, 1]),
        ([1, 1, 1], [0, 1, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([0, 1, 2], [1, 2, 0]),
        ([1], [0]),
    ],
)
@pytest.mark.filterwarnings("ignore:A single label")
def test_metrics_of_weighted_rows_are_those_of_repeated_rows(labels, predicted):
    labels_n, predicted_n = np.asarray(labels), np.asarray(predicted)
    weights_bn = np.random.default_rng(0).integers(0, 4, size=(20, len(labels_n)))
    weights_bn[0], weights_bn[1], weights_bn[:, 0] = 1, np.arange(len(labels_n)) == 0, 1
    given = (weights_bn.astype(np.float32), labels_n, predicted_n, 25)
    for metric, reference in (
        ("mcc", matthews_corrcoef),
        ("f1_macro", lambda *rows: f1_score(*rows, average="macro", zero_division=0)),
    ):
        expected = [reference(np.repeat(labels_n, times), np.repeat(predicted_n, times)) for times in weights_bn]
        assert weighted_score(metric, *given) == pytest.approx(expected, abs=1e-12)


def test_correlation_of_weighted_rows_is_that_of_repeated_rows():
    random = np.random.default_rng(0)
    labels_n = random.normal(1e4, 3, 60)
    outputs_n = (labels_n + random.normal(0, 3, 60)).astype(np.float32)
    weights_bn = random.integers(0, 4, size=(20, 60))
    weights_bn[0] = np.arange(60) == 3  # one row only
    for x_n, y_n in ((outputs_n, labels_n), (np.full(60, 0.1, np.float32), labels_n)):
        expected = [
            correlations(np.repeat(x_n, times), np.repeat(y_n, times))["pearson"] if times.sum() > 1 else 0.0
            for times in weights_bn
        ]
        found = weighted_score("pearson", weights_bn.astype(np.float32), y_n, x_n, 1)
        assert found == pytest.approx(expected, abs=1e-5)


def simulate(
    random: np.random.Generator, seeds: int, rows: int, accuracies: tuple[float, ...], spread: float = 0.0
) -> list[np.ndarray]:
    """Replicates of the mean MCC of a model for each accuracy, all on the same rows of two equally frequent classes."""
    labels_n = random.integers(2, size=rows)
    hard_n = random.random(rows)  # rows are easy or hard for all seeds alike, half of the time
    outputs = []
    for accuracy in accuracies:
        for _ in range(seeds):
            own_n = np.where(random.random(rows) < 0.5, hard_n, random.random(rows))
            right_n = own_n < accuracy + spread * random.normal()
            outputs.append(np.where(right_n, labels_n, 1 - labels_n))
    name = str(random.integers(1 << 60))
    scores_rb = run_replicates("mcc", labels_n, outputs, 2, name)
    return [draw_seeds(part, name, str(number)) for number, part in enumerate(np.split(scores_rb, len(accuracies)))]


@pytest.mark.parametrize(
    ("seeds", "spread", "low", "high"), [(1, 0.0, 0.90, 0.99), (3, 0.0, 0.93, 1.0), (3, 0.02, 0.90, 1.0)]
)
def test_intervals_cover_the_true_score_as_often_as_they_say(seeds, spread, low, high, monkeypatch):
    monkeypatch.setattr(statistics, "REPLICATES", 500)
    random = np.random.default_rng(5)
    covered = []
    for _ in range(200):
        left, right = interval(simulate(random, seeds, 250, (0.8,), spread)[0])
        covered.append(left <= 0.6 <= right)  # MCC = 2 x accuracy - 1
    assert low <= np.mean(covered) <= high


def test_p_is_small_for_a_difference_and_as_often_for_none_as_it_may_be(monkeypatch):
    monkeypatch.setattr(statistics, "REPLICATES", 500)
    random = np.random.default_rng(6)

    def p() -> float:
        first, second = simulate(random, 3, 300, accuracies)
        return p_value(first - second)

    accuracies = (0.9, 0.8)
    assert max(p() for _ in range(20)) < 0.05
    accuracies = (0.8, 0.8)
    assert np.mean([p() < 0.05 for _ in range(200)]) < 0.09


def test_p_has_its_bounds():
    assert p_value(np.zeros(9)) == 1
    assert p_value(np.ones(9)) == p_value(-np.ones(9)) == 1 / 10
    assert p_value(np.array([-1.0, 1, 1, 1])) == 0.5


def test_models_are_compared_on_the_same_rows_and_seeds_are_drawn():
    random = np.random.default_rng(0)
    labels_n = random.integers(3, size=100)
    first_n, second_n = (np.where(random.random(100) < 0.7, labels_n, 0) for _ in range(2))
    scores_rb = run_replicates("f1_macro", labels_n, [first_n, first_n, second_n], 3, "task")
    assert scores_rb.shape == (3, statistics.REPLICATES)
    assert np.array_equal(scores_rb[0], scores_rb[1])
    assert np.array_equal(draw_seeds(scores_rb[:2], "task", "model"), scores_rb[0])
    drawn = draw_seeds(scores_rb[1:], "task", "model")
    assert 0.2 < np.isclose(drawn, scores_rb[1]).mean() < 0.3  # both draws the first of two seeds
    assert np.array_equal(drawn, draw_seeds(scores_rb[1:], "task", "model"))


def test_memory_is_bounded_without_changing_the_numbers(monkeypatch):
    labels_n, predicted_n = classes_of(4, 64, 0)
    whole = run_replicates("mcc", labels_n, [predicted_n], 4, "task")
    monkeypatch.setattr(statistics, "AT_ONCE", 1)
    assert np.array_equal(whole, run_replicates("mcc", labels_n, [predicted_n], 4, "task"))


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []
