"""The report's tables for programs: full precision, nothing where there is no value."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.report.collect import SHOWN_PUBLISHED, Row, mean, published_scores, sd
from finetune.report.compare import Difference, Replicates
from finetune.report.statistics import interval

SCORES = (
    *("task", "model", "metric", "mean", "sd", "low", "high", "seeds", "collapsed", "failed", "mean_without_leaked"),
    *("sd_without_leaked", *(f"published_{name.lower().replace('-2', '2').replace('-', '_')}" for name in SHOWN_PUBLISHED)),
    "note",
)
DIFFERENCES = ("task", "model", "reference", "difference", "low", "high", "p", "p_holm", "note")


def scores_csv(rows: Sequence[Row], replicates: Replicates) -> str:
    """table.csv: a line a task and model."""
    published = published_scores()
    lines = []
    for row in rows:
        low, high = interval(replicates[row.key]) if row.key in replicates else (None, None)
        counts = (len(row.runs), len(row.collapsed), len(row.failed))
        beside = (published.get(row.task, {}).get(name) for name in SHOWN_PUBLISHED)
        clean = (mean(row.clean_scores), sd(row.clean_scores))
        lines.append([row.task, row.model, row.metric, row.mean, row.sd, low, high, *counts, *clean, *beside, row.note])
    return _csv(SCORES, lines)


def differences_csv(found: Sequence[Difference], reference: str | None) -> str:
    """comparison.csv: a line a task and model beside the reference; without one the header alone."""
    lines = []
    for one in found:
        low, high = one.interval or (None, None)
        lines.append([one.task, one.model, reference, one.difference, low, high, one.p, one.p_holm, one.note])
    return _csv(DIFFERENCES, lines)


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return stream.getvalue()
