"""Results files to rows, one a task and model: which runs count, which don't, and what a reader has to know of them."""

from __future__ import annotations

import hashlib
import json
import statistics
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError
from finetune.report.statistics import weighted_score
from finetune.results import failed_path, read_result
from finetune.tasks import PUBLISHED, metric_of

PUBLISHED_FILE = Path(__file__).parents[1] / "published.json"
SHOWN_PUBLISHED = ("DNABERT-2", "DNABERT-2-FP")  # models of that file; the second was pre-trained further on the benchmark
METRICS = {"mcc": "MCC", "f1_macro": "macro F1", "pearson": "Pearson"}
SPLITS = ("train", "dev", "test")
SAME_SCORE = 1e-5  # fp32 outputs, added in another order


@dataclass(frozen=True)
class Predictions:
    """What a run said of the test rows."""

    labels_n: NDArray[Any]  # int64 classes, or fp64 numbers
    outputs_n: NDArray[Any]  # predicted classes, or numbers
    classes: int  # 1 for numbers
    rows: str  # a name that is equal for equal rows


@dataclass(frozen=True)
class Run:
    """A run that ended well."""

    result: Mapping[str, Any]
    score: float | None  # the task's metric x 100; None where all test rows are leaked and must not count
    clean_score: float | None  # the same over the rows that are not leaked; None where none is
    predictions: Predictions | None  # None where the file is gone


@dataclass(frozen=True)
class Row:
    """The runs of one task and model."""

    task: str
    model: str
    metric: str
    runs: tuple[Run, ...]  # those that count
    collapsed: tuple[Run, ...]
    failed: tuple[Mapping[str, Any], ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.model

    @property
    def scores(self) -> list[float]:
        return [run.score for run in self.runs if run.score is not None]

    @property
    def mean(self) -> float | None:
        return mean(self.scores)

    @property
    def sd(self) -> float | None:
        return sd(self.scores)

    @property
    def clean_scores(self) -> list[float]:
        return [run.clean_score for run in self.runs if run.clean_score is not None]

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """Of all runs that ended."""
        return [run.result for run in (*self.runs, *self.collapsed)]

    @property
    def deterministic(self) -> bool:
        return bool(self.results) and all(result["deterministic"] for result in self.results)

    @property
    def predictions(self) -> list[Predictions]:
        """Of the runs that count; none unless all have theirs, of the same rows."""
        there = [run.predictions for run in self.runs if run.predictions is not None]
        return there if len(there) == len(self.runs) and len({one.rows for one in there}) == 1 else []

    @cached_property
    def note(self) -> str:
        """What a reader of the mean has to know."""
        total, notes = len(self.runs) + len(self.collapsed) + len(self.failed), []
        if self.collapsed:
            what = "one value" if self.metric == "pearson" else "one class"
            notes.append(f"{len(self.collapsed)} of {total} runs collapsed to {what} and are not in the mean")
        if self.failed:
            notes.append(f"{len(self.failed)} of {total} runs failed")
        if different := _different(self.results):
            notes.append(f"the runs are not of one kind, they differ in {', '.join(different)}")
        if truncated := max((result["data"]["test"]["truncated"] for result in self.results), default=0):
            notes.append(f"{truncated} test sequences truncated")
        if any(run.score is None for run in self.runs):
            notes.append("every test row is leaked")
        elif self.runs and not self.predictions:
            gone = any(run.predictions is None for run in self.runs)
            notes.append(f"no interval: {'predictions are gone' if gone else 'the runs have different test rows'}")
        return "; ".join(notes)


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def published_scores() -> dict[str, dict[str, float]]:
    """Task -> published model -> score."""
    published = json.loads(PUBLISHED_FILE.read_text())
    return {task: dict(zip(published["models"], row, strict=True)) for task, row in published["scores"].items()}


def collect(results: Path, clean: bool = False) -> list[Row]:
    """The rows of all runs below a folder, in the order of the published table, other tasks after it.

    With `clean`, scores and predictions are of the test rows that are not leaked. Raises InputError.
    """
    if not results.is_dir():
        raise InputError(f"{results}: no such folder; give the --out of `finetune run`")
    found = sorted(results.glob("*/*/seed-*.json"))
    notes = [path for path in found if path.name.endswith(".failed.json")]
    paths = [path for path in found if path not in set(notes)]
    if not found:
        raise InputError(f"{results}: no results (TASK/MODEL/seed-N.json) in it; give the --out of `finetune run`")
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    places: dict[tuple[str, str, int], Path] = {}
    metrics: dict[str, str] = {}
    for path in paths:
        result = read_result(path)
        task, model, metric = result["task"], result["model"], result["metric"]
        other = places.setdefault((task, model, result["seed"]), path)
        if other != path:
            raise InputError(f"{other} and {path} are both {task}, {model}, seed {result['seed']}; remove one")
        if metric not in METRICS or metrics.setdefault(task, metric) != metric:
            raise InputError(
                f"{path}: metric {metric}, but it must be one of {', '.join(METRICS)}, and one for all of {task}"
            )
        runs[task, model].append(_read_run(path, result, clean))
    failed: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    done = {failed_path(path) for path in paths}
    for path in notes:
        if path not in done:  # a run that was done again, and ended before it could remove the note
            note = _read_failure(path)
            failed[note["task"], note["model"]].append(note)
    return [
        Row(
            task,
            model,
            metrics.get(task, metric_of(task)),
            tuple(run for run in runs[task, model] if not run.result["collapsed"]),
            tuple(run for run in runs[task, model] if run.result["collapsed"]),
            tuple(failed[task, model]),
        )
        for task, model in sorted(runs.keys() | failed.keys(), key=_place())
    ]


def _place() -> Any:
    """A sort key of (task, model)."""
    known = {task: number for number, task in enumerate(dict.fromkeys([*published_scores(), *PUBLISHED]))}
    return lambda key: (known.get(key[0], len(known)), *key)


def _read_run(path: Path, result: Mapping[str, Any], clean: bool) -> Run:
    metric, without = result["metric"], result["test_clean"]
    clean_score = None if without is None else 100 * without[metric]
    score = clean_score if clean and result["data"]["test"]["leaked"] else 100 * result["test"][metric]
    predictions = None if score is None else _read_predictions(path.with_name(result["predictions"]), result, clean)
    if predictions is not None and score is not None:
        ones = np.ones((1, len(predictions.labels_n)), dtype=np.float32)
        again = weighted_score(metric, ones, predictions.labels_n, predictions.outputs_n, predictions.classes)
        if abs(100 * float(again[0]) - score) > 100 * SAME_SCORE:
            raise InputError(
                f"{path}: says {metric} {score / 100:.6f}, but {result['predictions']} beside it gives {again[0]:.6f}; "
                "remove both and run again"
            )
    return Run(result, score, clean_score, predictions)


def _read_predictions(path: Path, result: Mapping[str, Any], clean: bool) -> Predictions | None:
    """None where the file is gone."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logits_nc, labels_n, leaked_n = (arrays[f"test_{name}"] for name in ("logits", "labels", "leaked"))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path}: not the predictions of a run; remove it and run again") from None
    kept_n = ~leaked_n if clean else np.ones_like(leaked_n)
    logits_nc, labels_n = logits_nc[kept_n], labels_n[kept_n]
    numbers = result["kind"] == "regression"
    labels_n = labels_n.astype(np.float64 if numbers else np.int64)
    rows = hashlib.sha256(labels_n.tobytes() + kept_n.tobytes()).hexdigest()
    outputs_n = logits_nc[:, 0] if numbers else logits_nc.argmax(-1).astype(np.int32)
    return Predictions(labels_n, outputs_n, logits_nc.shape[1], rows)


def _read_failure(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_bytes())
        return {key: note[key] for key in ("task", "model", "seed", "error", "status")}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not what `finetune run` writes of a run that failed; remove it") from None


def _different(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same in runs that should differ in their seeds alone."""
    keys = dict.fromkeys(key for result in results for key in result["settings"])
    different = [key for key in keys if several(result["settings"].get(key) for result in results)]
    if any(several(result["data"][split]["sha256"] for result in results) for split in SPLITS):
        different.append("data")
    # Fresh weights differ from seed to seed, as they should.
    if several(result["source"]["encoder_sha256"] for result in results if result["source"]["kind"] != "random"):
        different.append("weights")
    if several(result["source"]["tokenizer_sha256"] for result in results):
        different.append("tokenizer")
    return different


def several(values: Iterable[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values}) > 1
