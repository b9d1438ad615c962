"""How sure a score is: bootstrap over test rows and seeds, paired tests, Holm's adjustment. Knows arrays only, no files.

A replicate draws test rows with replacement, and seeds with replacement (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993). Its score is the mean of the metric over the drawn seeds, on the drawn rows. Two models are compared on
the same drawn rows (the paired bootstrap test: Berg-Kirkpatrick, Burkett and Klein, "An Empirical Investigation of
Statistical Significance in NLP", EMNLP 2012). Drawing both rows and seeds errs towards intervals that are too wide (Owen,
"The Pigeonhole Bootstrap", Annals of Applied Statistics, 2007).

Dimensions: b replicates, n test rows, c classes, r runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
LEVEL = 95  # per cent, of intervals
AT_ONCE = 1 << 21  # weights in memory: 8 MiB

Floats = NDArray[np.float64]


def generator(*names: str) -> np.random.Generator:
    """A random generator that depends on the names alone, so that equal results give equal reports."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:16], "little"))


def run_replicates(
    metric: str, labels_n: NDArray[np.generic], outputs_rn: Sequence[NDArray[np.generic]], classes: int, task: str
) -> Floats:
    """The metric of each run on REPLICATES draws of the test rows, the same for all runs: [r, b]."""
    scores = [
        [weighted_score(metric, weights_bn, labels_n, outputs_n, classes) for outputs_n in outputs_rn]
        for weights_bn in _row_weights(generator(task), len(labels_n))
    ]
    return np.concatenate(scores, axis=1)


def _row_weights(random: np.random.Generator, rows: int) -> Iterator[NDArray[np.float32]]:
    """How often each replicate has each row, some replicates at a time: [some of b, n]."""
    step = max(1, AT_ONCE // rows)
    for start in range(0, REPLICATES, step):
        count = min(step, REPLICATES - start)
        drawn = random.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float32)


def draw_seeds(scores_rb: Floats, task: str, model: str) -> Floats:
    """Means over seeds that each replicate draws from a model's runs: [b]. Of a single run its scores."""
    runs, replicates = scores_rb.shape
    drawn_br = generator(task, model).integers(runs, size=(replicates, runs))
    return scores_rb[drawn_br, np.arange(replicates)[:, None]].mean(axis=1)


def interval(replicates_b: Floats) -> tuple[float, float]:
    """The percentile interval."""
    low, high = np.percentile(replicates_b, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def p_value(differences_b: Floats) -> float:
    """Two-sided: how often the replicates of a difference lie on the other side of 0, twice.

    Never below 1 / (replicates + 1): so many draws can't show less.
    """
    tail = min(float((differences_b <= 0).mean()), float((differences_b >= 0).mean()))
    return min(1.0, max(2 * tail, 1 / (len(differences_b) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def weighted_score(
    metric: str,
    weights_bn: NDArray[np.float32],
    labels_n: NDArray[np.generic],
    outputs_n: NDArray[np.generic],
    classes: int,
) -> Floats:
    """A metric on rows that count as often as their weights say, for each set of weights: [b].

    Args:
        metric: mcc and f1_macro of predicted classes, pearson of predicted numbers.
    """
    if metric == "pearson":
        return _pearson(weights_bn, labels_n.astype(np.float64), outputs_n.astype(np.float64))
    true_nc = labels_n[:, None] == np.arange(classes)
    predicted_nc = outputs_n[:, None] == np.arange(classes)
    # Sums of the confusion matrix and its diagonal: all that both metrics need. Exact in fp32 up to 2^24 rows.
    columns = np.concatenate([true_nc, predicted_nc, true_nc & predicted_nc], axis=1).astype(np.float32)
    true_bc, predicted_bc, hits_bc = np.split((weights_bn @ columns).astype(np.float64), 3, axis=1)
    return (_matthews if metric == "mcc" else _macro_f1)(true_bc, predicted_bc, hits_bc)


def _matthews(true_bc: Floats, predicted_bc: Floats, hits_bc: Floats) -> Floats:
    """Matthews correlation of any number of classes (Gorodkin's R_K, 2004), 0 where labels or predictions are all one."""
    rows_b = true_bc.sum(axis=1)
    covariance_b = hits_bc.sum(axis=1) * rows_b - (true_bc * predicted_bc).sum(axis=1)
    variances_b = (rows_b**2 - (true_bc**2).sum(axis=1)) * (rows_b**2 - (predicted_bc**2).sum(axis=1))
    return np.where(variances_b > 0, covariance_b / np.sqrt(np.where(variances_b > 0, variances_b, 1)), 0.0)


def _macro_f1(true_bc: Floats, predicted_bc: Floats, hits_bc: Floats) -> Floats:
    """Mean F1 of the classes that occur among labels or predictions."""
    sizes_bc = true_bc + predicted_bc
    return (2 * hits_bc / np.maximum(sizes_bc, 1)).sum(axis=1) / (sizes_bc > 0).sum(axis=1)


def _pearson(weights_bn: NDArray[np.float32], labels_n: Floats, outputs_n: Floats) -> Floats:
    """Pearson's correlation, 0 where labels or outputs are constant."""
    x_n, y_n = (_standardized(values_n) for values_n in (labels_n, outputs_n))
    moments = np.stack([x_n, y_n, x_n * x_n, y_n * y_n, x_n * y_n], axis=1)
    means = weights_bn.astype(np.float64) @ moments / weights_bn.sum(axis=1, dtype=np.float64)[:, None]
    x_b, y_b, xx_b, yy_b, xy_b = means.T
    x_variance_b, y_variance_b = xx_b - x_b**2, yy_b - y_b**2
    varies_b = (x_variance_b > 1e-12) & (y_variance_b > 1e-12)  # of a whole that has 1: the rest is rounding
    return np.where(varies_b, (xy_b - x_b * y_b) / np.sqrt(np.where(varies_b, x_variance_b * y_variance_b, 1)), 0.0)


def _standardized(values_n: Floats) -> Floats:
    deviation = values_n.std()
    return (values_n - values_n.mean()) / deviation if deviation > 0 else np.zeros_like(values_n)
