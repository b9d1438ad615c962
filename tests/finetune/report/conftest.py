"""Results folders made up for the tests of the report: files as runs leave them, with predictions that give their scores."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.metrics import Objective
from finetune.results import FORMAT_VERSION, failed_path, result_path
from finetune.tasks import metric_of, settings_for


class Results:
    """A folder to which runs are added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        task: str,
        model: str,
        seed: int = 0,
        *,
        accuracy: float = 0.8,
        rows: int = 200,
        classes: int = 2,
        collapsed: bool = False,
        leaked: int = 0,
        kind: str = "pretrained",
        method: str = "full",
        weights: str = "w",
        truncated: int = 0,
        labels_seed: int = 0,
        **changes: Any,
    ) -> Path:
        """Write a run whose outputs are right with the probability `accuracy`; for 1 class, numbers correlated like that.

        Its test rows depend on the task and `labels_seed`; the first `leaked` of them are leaked, and always right.
        """
        random = np.random.default_rng([labels_seed, *task.encode()])
        own = np.random.default_rng([seed, *f"{task} {model}".encode()])
        regression = classes == 1
        if regression:
            labels_n = random.normal(5, 2, rows)
            noise_n = own.normal(0, 2, rows)
            logits_nc = (accuracy * labels_n + np.sqrt(1 - accuracy**2) * noise_n)[:, None]
        else:
            labels_n = random.integers(classes, size=rows)
            wrong_n = (own.random(rows) >= accuracy) & (np.arange(rows) >= leaked)
            predicted_n = np.where(wrong_n, (labels_n + own.integers(1, classes, rows)) % classes, labels_n)
            logits_nc = np.eye(classes, dtype=np.float32)[np.zeros_like(predicted_n) if collapsed else predicted_n]
        leaked_n = np.arange(rows) < leaked
        objective = Objective(classes)
        metric = metric_of(task, "regression" if regression else "classification")
        split = {
            "rows": rows,
            "sha256": hashlib.sha256(labels_n.tobytes()).hexdigest(),
            "truncated": truncated,
            "leaked": 0,
        }
        test = objective.evaluate(logits_nc, labels_n)
        result = {
            "format_version": FORMAT_VERSION,
            "task": task,
            "kind": "regression" if regression else "classification",
            "metric": metric,
            "model": model,
            "method": method,
            "deterministic": method == "kmer",
            "protocol": "strict",
            "changed": sorted(changes),
            "seed": seed,
            "settings": settings_for(task, method=method, **changes).model_dump(mode="json"),
            "source": {"kind": kind, "encoder_sha256": weights, "tokenizer_sha256": "t"},
            "data": {"classes": classes, "train": split, "dev": split, "test": {**split, "leaked": leaked}},
            "dev": test,
            "test": test,
            "test_clean": objective.evaluate(logits_nc[~leaked_n], labels_n[~leaked_n]) if 0 < leaked < rows else None,
            "collapsed": collapsed,
            "predictions": f"seed-{seed}.npz",
        }
        path = result_path(self.folder, task, model, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".npz"), test_logits=logits_nc, test_labels=labels_n, test_leaked=leaked_n)
        result["predictions_sha256"] = hashlib.sha256(path.with_suffix(".npz").read_bytes()).hexdigest()
        path.write_text(json.dumps(result))
        return path

    def fail(self, task: str, model: str, seed: int, error: str = "the training loss is nan") -> Path:
        path = failed_path(result_path(self.folder, task, model, seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task": task, "model": model, "seed": seed, "error": error, "status": 1}))
        return path


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """An empty results folder."""
    return Results(tmp_path / "results")
