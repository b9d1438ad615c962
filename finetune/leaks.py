"""Rows of dev and test whose sequence the training data holds too: their score says what a model remembers.

A sequence is the same on either strand: the reverse complement of a row gives its answer away as well.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from finetune.data import Rows, Task, strandless


def held_by(rows: Rows, others: Iterable[Rows]) -> NDArray[np.bool_]:
    """Which of the rows have their sequence in `others`, on either strand. bool [rows]."""
    known = {strandless(text) for other in others for text in other.texts()}
    return np.array([strandless(text) in known for text in rows.texts()], dtype=np.bool_)


def leaked(task: Task) -> dict[str, NDArray[np.bool_]]:
    """Rows of dev that train holds, and rows of test that train or dev hold: bool [rows] of each."""
    train, dev, test = (task.splits[split] for split in ("train", "dev", "test"))
    return {"dev": held_by(dev, [train]), "test": held_by(test, [train, dev])}
