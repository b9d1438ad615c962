"""Tables over the results files of many runs: a row a task and model, the published score beside."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log, write_atomically
from finetune.run import read_result

PUBLISHED_FILE = Path(__file__).parent / "published.json"
METRICS = {"mcc": "MCC", "f1_macro": "macro F1"}


@dataclass(frozen=True)
class Row:
    """One task and model; scores are the task's metric x 100 on test."""

    task: str
    model: str
    metric: str
    scores: list[float]  # a run a seed, collapsed runs left out
    collapsed: list[float]  # those
    published: float | None  # DNABERT-2's
    note: str

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def report(results: Path, out: Path) -> dict[str, Any]:
    """Write `out`/table.md and table.csv for the runs below `results`; return what `--json` prints."""
    if not results.is_dir():
        raise InputError(f"{results}: no such folder; give the --out of `finetune run`")
    paths = sorted(results.glob("*/*/seed-*.json"))
    if not paths:
        raise InputError(f"{results}: no results (TASK/MODEL/seed-N.json) in it; give the --out of `finetune run`")
    rows = collect([read_result(path) for path in paths])
    write_atomically(out / "table.csv", as_csv(rows).encode())
    write_atomically(out / "table.md", as_markdown(rows).encode())
    for row in rows:
        if row.collapsed:
            log(f"{row.task}, {row.model}: {row.note}")
    log(f"{out / 'table.md'}, {out / 'table.csv'}: {len(paths)} runs, {len(rows)} rows")
    return {
        "runs": len(paths),
        "rows": len(rows),
        "collapsed": sum(len(row.collapsed) for row in rows),
        "table": str(out / "table.md"),
    }


def collect(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Results files to rows, in the order of the published table, other tasks after it."""
    published = json.loads(PUBLISHED_FILE.read_text())
    column = published["models"].index("DNABERT-2")
    order = list(published["scores"])
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["task"], result["model"]].append(result)

    def place(key: tuple[str, str]) -> tuple[int, str, str]:
        return (order.index(key[0]) if key[0] in order else len(order), *key)

    rows = []
    for task, model in sorted(groups, key=place):
        runs = groups[task, model]
        metric = runs[0]["metric"]
        scores: dict[bool, list[float]] = {True: [], False: []}
        for run in runs:
            scores[bool(run["collapsed"])].append(100 * run["test"][metric])
        score = published["scores"].get(task)
        rows.append(
            Row(task, model, metric, scores[False], scores[True], score and score[column], _note(runs, scores[True]))
        )
    return rows


def _note(runs: Sequence[Mapping[str, Any]], collapsed: Sequence[float]) -> str:
    """What a reader of the mean has to know."""
    notes = []
    if collapsed:
        notes.append(f"{len(collapsed)} of {len(runs)} runs collapsed to one class and are not in the mean")
    different = [key for key in runs[0]["settings"] if _several(run["settings"][key] for run in runs)]
    if any(_several(run["data"][split]["sha256"] for run in runs) for split in ("train", "dev", "test")):
        different.append("data")
    # Fresh weights differ from seed to seed, as they should.
    if _several(run["source"]["encoder_sha256"] for run in runs if run["source"]["kind"] != "random"):
        different.append("weights")
    if different:
        notes.append(f"the runs are not of one kind, they differ in {', '.join(different)}")
    truncated = max(run["data"]["test"]["truncated"] for run in runs)
    if truncated:
        notes.append(f"{truncated} test sequences truncated")
    return "; ".join(notes)


def _several(values: Iterable[Any]) -> bool:
    return len({json.dumps(value) for value in values}) > 1


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = [
        "# Fine-tuning results",
        "",
        "Test score x 100, mean ± sample standard deviation over seeds. Published: DNABERT-2 (arXiv 2306.15006).",
        "",
        "| task | model | metric | score | seeds | collapsed | DNABERT-2, published | note |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        score = _decimal(row.mean) + (f" ± {_decimal(row.sd)}" if row.sd is not None else "")
        cells = [
            row.task,
            row.model,
            METRICS[row.metric],
            score,
            str(len(row.scores)),
            str(len(row.collapsed) or ""),
            _decimal(row.published),
            row.note,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def as_csv(rows: Sequence[Row]) -> str:
    """The table for programs: full precision, nothing where there is no value."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["task", "model", "metric", "mean", "sd", "seeds", "collapsed", "published_dnabert2", "note"])
    for row in rows:
        writer.writerow(
            [
                row.task,
                row.model,
                row.metric,
                row.mean,
                row.sd,
                len(row.scores),
                len(row.collapsed),
                row.published,
                row.note,
            ]
        )
    return stream.getvalue()
