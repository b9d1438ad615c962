"""The benchmark's metrics, by scikit-learn, from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def scores(logits_nc: NDArray[np.float32], labels_n: NDArray[np.int64]) -> dict[str, float]:
    """Matthews correlation, macro F1 and accuracy of the largest logit, each a fraction of 1.

    A class that is neither among the labels nor predicted doesn't count in macro F1; one that is only among the labels
    counts 0.
    """
    predicted_n = logits_nc.argmax(-1)
    return {
        "mcc": float(matthews_corrcoef(labels_n, predicted_n)),
        "f1_macro": float(f1_score(labels_n, predicted_n, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(labels_n, predicted_n)),
    }


def cross_entropy(logits_nc: NDArray[np.float32], labels_n: NDArray[np.int64]) -> float:
    """Mean over the rows, in fp64."""
    wide_nc = logits_nc.astype(np.float64)
    wide_nc -= wide_nc.max(-1, keepdims=True)
    chosen_n = np.take_along_axis(wide_nc, labels_n[:, None], 1)[:, 0]
    return float((np.log(np.exp(wide_nc).sum(-1)) - chosen_n).mean())


def collapsed(logits_nc: NDArray[np.float32]) -> bool:
    """Whether one class is predicted throughout: a run that failed, whose score says nothing about the model."""
    return len(np.unique(logits_nc.argmax(-1))) == 1
