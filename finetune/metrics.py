"""What a run optimises and what it is scored by: classification and regression, from the numbers that a model puts out.

Scores are scikit-learn's. A regression is trained on standardized labels, so that its learning rate doesn't depend on their
unit; its outputs and scores are in the labels' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, r2_score


@dataclass(frozen=True)
class Objective:
    """What is predicted.

    Attributes:
        classes: number of classes; 1 for regression.
        mean, sd: of the training labels of a regression.
    """

    classes: int
    mean: float = 0.0
    sd: float = 1.0

    @classmethod
    def of(cls, classes: int, train_labels: NDArray[Any]) -> Objective:
        if classes > 1:
            return cls(classes)
        return cls(1, float(train_labels.mean()), float(train_labels.std()))

    @property
    def score(self) -> str:
        """The score by which models are chosen."""
        return "pearson" if self.classes == 1 else "mcc"

    def targets(self, labels_n: NDArray[Any]) -> NDArray[Any]:
        """What a model is trained to put out: classes int64 [n], or standardized numbers fp32 [n]."""
        return labels_n if self.classes > 1 else ((labels_n - self.mean) / self.sd).astype(np.float32)

    def outputs(self, raw_nc: NDArray[np.float32]) -> NDArray[Any]:
        """Logits as they are, fp32; predicted numbers in the labels' unit, fp64. [n, classes]."""
        return raw_nc if self.classes > 1 else raw_nc.astype(np.float64) * self.sd + self.mean

    def evaluate(self, outputs_nc: NDArray[Any], labels_n: NDArray[Any]) -> dict[str, float]:
        """`loss` (cross entropy, or squared error of standardized labels) and scores."""
        if self.classes > 1:
            return {"loss": cross_entropy(outputs_nc, labels_n), **scores(outputs_nc, labels_n)}
        mse = float(np.square(outputs_nc[:, 0] - labels_n).mean())
        return {"loss": mse / self.sd**2, "mse": mse, **correlations(outputs_nc[:, 0], labels_n)}

    def collapsed(self, outputs_nc: NDArray[Any]) -> bool:
        """Whether the same is predicted throughout: a run that failed, whose score says nothing about the model."""
        if self.classes > 1:
            return len(np.unique(outputs_nc.argmax(-1))) == 1
        return float(np.ptp(outputs_nc)) <= 1e-3 * self.sd


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


def correlations(predicted_n: NDArray[Any], labels_n: NDArray[np.float64]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and R^2; a correlation with something constant is 0."""
    from scipy.stats import rankdata

    def pearson(x: NDArray[Any], y: NDArray[Any]) -> float:
        x, y = x.astype(np.float64), y.astype(np.float64)
        x, y = x - x.mean(), y - y.mean()
        norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
        return float((x * y).sum()) / norm if norm > 0 else 0.0

    r2 = float(r2_score(labels_n, predicted_n)) if len(labels_n) > 1 else 0.0
    return {
        "pearson": pearson(predicted_n, labels_n),
        "spearman": pearson(rankdata(predicted_n), rankdata(labels_n)),
        "r2": r2,
    }


def cross_entropy(logits_nc: NDArray[np.float32], labels_n: NDArray[np.int64]) -> float:
    """Mean over the rows, in fp64."""
    wide_nc = logits_nc.astype(np.float64)
    wide_nc -= wide_nc.max(-1, keepdims=True)
    chosen_n = np.take_along_axis(wide_nc, labels_n[:, None], 1)[:, 0]
    return float((np.log(np.exp(wide_nc).sum(-1)) - chosen_n).mean())
