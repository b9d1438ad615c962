"""Logistic regression (ridge for numbers) on fixed features, its penalty chosen on dev: linear probe and k-mer baseline.

By scikit-learn: the problem is convex and solved to the end, so neither a seed nor a learning rate plays a part.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import log
from finetune.metrics import Objective

PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)  # times half the squared weights, beside the mean loss of a row
ITERATIONS = 300


def fit_linear(
    features: Mapping[str, Any], labels: Mapping[str, NDArray[Any]], objective: Objective, best_by: str
) -> tuple[dict[str, NDArray[Any]], list[dict[str, Any]], float]:
    """Fit on train, choose on dev.

    Args:
        features: dense or CSR [rows, features] of train, dev and test; scaled here to unit variance on train.
        labels: [rows] of train and dev.

    Returns:
        Outputs (`Objective.outputs`) of dev and test, [rows, classes]; of each penalty its dev loss and score; the
        chosen one.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=not hasattr(features["train"], "tocsr")).fit(features["train"])
    scaled = {split: scaler.transform(values) for split, values in features.items()}
    curves: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], float, dict[str, NDArray[Any]]] | None = None
    for penalty in PENALTIES:
        started = time.monotonic()
        outputs = _fit(scaled, objective.targets(labels["train"]), objective, penalty)
        dev = objective.evaluate(outputs["dev"], labels["dev"])
        curves.append({"penalty": penalty, "dev_loss": dev["loss"], f"dev_{objective.score}": dev[objective.score]})
        log(
            f"penalty {penalty:g}: dev loss {dev['loss']:.4f}, dev {objective.score} {dev[objective.score]:.4f}, "
            f"{time.monotonic() - started:.1f} s"
        )
        rank = (dev[objective.score] if best_by == "score" else 0.0, -dev["loss"])
        if best is None or rank > best[0]:
            best = rank, penalty, outputs
    assert best is not None
    return best[2], curves, best[1]


def _fit(
    scaled: Mapping[str, Any], targets_n: NDArray[Any], objective: Objective, penalty: float
) -> dict[str, NDArray[Any]]:
    """Outputs of dev and test."""
    if objective.classes == 1:
        from sklearn.linear_model import Ridge

        ridge = Ridge(alpha=penalty * len(targets_n)).fit(scaled["train"], targets_n)
        return {
            split: objective.outputs(ridge.predict(scaled[split])[:, None].astype(np.float32)) for split in ("dev", "test")
        }
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (penalty * len(targets_n)), max_iter=ITERATIONS)  # C times the *sum* of losses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of weak penalties; dev has the last word
        model.fit(scaled["train"], targets_n)
    outputs = {}
    for split in ("dev", "test"):
        logits = model.decision_function(scaled[split])  # of two classes: of the second one, the first has 0
        outputs[split] = np.stack([np.zeros_like(logits), logits], axis=1) if logits.ndim == 1 else logits
    return {split: logits.astype(np.float32) for split, logits in outputs.items()}
