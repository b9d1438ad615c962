"""The report's text for people: table.md. What stands in its tables for programs is in `tables.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from finetune.report.collect import METRICS, SHOWN_PUBLISHED, Row, mean, published_scores, sd, several
from finetune.report.compare import Average, Difference, Interval, Replicates
from finetune.report.protocol import protocol_lines
from finetune.report.statistics import LEVEL, REPLICATES
from finetune.report.statistics import interval as interval_of

NONE = "–"
STAR = "A mean with * is over fewer tasks than other models have and must not be compared with theirs. "


def markdown(
    rows: Sequence[Row],
    replicates: Replicates,
    found: Sequence[Difference],
    means: Sequence[Average],
    reference: str | None,
    verdict: str | None,
    clean: bool,
) -> str:
    """The text of table.md."""
    parts = [
        "# Fine-tuning results",
        verdict,
        _introduction(rows, clean),
        _scores(rows, replicates, clean),
        *(_differences(found, reference) if reference is not None else ()),
        *(_averages(means, reference) if means else ()),
        "![Scores with their intervals](scores.png)",
        *_section("What differs from the published protocol", [f"* {line}." for line in protocol_lines(rows)]),
        *_section("Runs that failed", _failures(rows)),
        *_section("Notes", _notes(rows, reference)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(rows: Sequence[Row], clean: bool) -> str:
    published = " and ".join(SHOWN_PUBLISHED)
    which = "on those test rows whose sequence is in neither train nor dev" if clean else "on test"
    beside = "; theirs are on all test rows" if clean else ""
    return (
        f"Score x 100 {which}, mean ± sample standard deviation over seeds; runs that collapsed or failed are not in it. "
        f"Published: {published} (arXiv 2306.15006{beside})."
    )


def _scores(rows: Sequence[Row], replicates: Replicates, clean: bool) -> str:
    published = published_scores()
    leaks = not clean and any(row.clean_scores for row in rows)
    failed = any(row.failed for row in rows)
    head = ["task", "model", "metric", "score", f"{LEVEL} % interval"]
    head += ["without leaked rows"] * leaks + ["seeds", "collapsed"] + ["failed"] * failed
    lines = []
    for row in rows:
        interval = interval_of(replicates[row.key]) if row.key in replicates else None
        line = [row.task, row.model, METRICS[row.metric], _score(row.scores), _interval(interval)]
        line += [_score(row.clean_scores)] * leaks
        line += [_seeds(row), str(len(row.collapsed) or "")] + [str(len(row.failed) or "")] * failed
        line += [decimal(published.get(row.task, {}).get(name)) for name in SHOWN_PUBLISHED]
        lines.append([*line, row.note])
    return _table([*head, *(f"{name}, published" for name in SHOWN_PUBLISHED), "note"], lines, text=3)


def _seeds(row: Row) -> str:
    return "any" if row.deterministic and row.runs else str(len(row.runs))


def _differences(found: Sequence[Difference], reference: str | None) -> list[str]:
    head = ["task", "model", "difference", f"{LEVEL} % interval", "p", "p, Holm", "note"]
    lines = [
        [
            one.task,
            one.model,
            _signed(one.difference),
            _interval(one.interval, signed=True),
            _p(one.p),
            _p(one.p_holm),
            one.note,
        ]
        for one in found
    ]
    return [f"## Differences to `{reference}`", _table(head, lines, text=2)]


def _averages(means: Sequence[Average], reference: str | None) -> list[str]:
    compared = reference is not None
    head = ["group", "model", "tasks", "mean", f"{LEVEL} % interval"]
    head += [f"difference to `{reference}`", f"{LEVEL} % interval"] * compared
    lines = []
    for one in means:
        tasks = f"{len(one.tasks)} of {one.size}" if len(one.tasks) < one.size else str(one.size)
        mark = " *" if one.fewer else ""
        line = [one.group, one.model, tasks, decimal(one.mean) + mark, _interval(one.interval)]
        if compared:
            over = f" (in {one.shared})" if one.shared not in (0, len(one.tasks)) else ""
            line += [_signed(one.difference) + over, _interval(one.difference_interval, signed=True)]
        lines.append([*line, *(decimal(value) for value in one.published), one.note])
    text = "The published means beside a model's are over the same tasks. "
    text += STAR * any(one.fewer for one in means)
    text += "A difference is over the tasks that both models have, their number beside it if it is another." * compared
    head += [f"{name}, published" for name in SHOWN_PUBLISHED]
    return ["## Means over the paper's groups", _table([*head, "note"], lines, text=2), text.strip()]


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"* {row.task}, {row.model}, seed {run['seed']}: {' '.join(str(run['error']).split())} (status {run['status']})"
        for row in rows
        for run in row.failed
    ]


def _notes(rows: Sequence[Row], reference: str | None) -> list[str]:
    lines = [
        f"* Intervals: {LEVEL} % percentile intervals of {REPLICATES:,} bootstrap replicates, each with test rows and seeds "
        "drawn with replacement (Efron and Tibshirani 1993). What is particular to a seed on a row counts in both draws, "
        "which makes them rather too wide (Owen, The Pigeonhole Bootstrap, 2007). Of k seeds they show (k - 1)/k of the "
        "variance between seeds, so few seeds that differ much make them too narrow. The choice of tasks and of splits is "
        "not in them."
    ]
    single = [row for row in rows if len(row.runs) == 1 and not row.deterministic]
    if single:
        lines.append(f"* One seed only, so the interval is of the test rows alone: {_rows(single)}.")
    if fixed := sorted({row.model for row in rows if row.deterministic}):
        lines.append(
            f"* Every seed gives the same numbers, so the intervals are of the test rows alone: {', '.join(fixed)}."
        )
    if reference is not None:
        lines.append(
            "* p: two-sided paired bootstrap test, both models on the same drawn rows (Berg-Kirkpatrick et al. 2012), never "
            f"below 1/{REPLICATES + 1:,}. Holm: adjusted for the number of tasks of the model (Holm 1979)."
        )
    if leaked := [row for row in rows if row.clean_scores]:
        lines.append(
            f"* Leaked rows are test rows whose sequence, on either strand, is in train or dev too: {_leaks(leaked)}."
        )
    for model in dict.fromkeys(row.model for row in rows):
        results = [result for row in rows if row.model == model for result in row.results]
        if several(result["source"]["encoder_sha256"] for result in results if result["source"]["kind"] == "pretrained"):
            lines.append(f"* The runs of `{model}` began with different pre-trained weights.")
    return lines


def _rows(rows: Sequence[Row]) -> str:
    tasks: dict[str, list[str]] = {}
    for row in rows:
        tasks.setdefault(row.model, []).append(row.task)
    return "; ".join(f"{model} in {len(names) if len(names) > 3 else ', '.join(names)}" for model, names in tasks.items())


def _leaks(rows: Sequence[Row]) -> str:
    counts = {row.task: row.results[0]["data"]["test"] for row in rows}
    return ", ".join(f"{task} {test['leaked']:,} of {test['rows']:,}" for task, test in counts.items())


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], text: int) -> str:
    """A Markdown table; the first `text` columns and the last, the note, are flush left. Without a note none is shown."""
    rows = [list(line) for line in lines]
    sides = ["---"] * text + ["---:"] * (len(head) - text - 1) + ["---"]
    if not any(row[-1] for row in rows):
        head, sides, rows = head[:-1], sides[:-1], [row[:-1] for row in rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in [head, sides, *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def decimal(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}"


def _score(scores: Sequence[float]) -> str:
    deviation = sd(scores)
    return decimal(mean(scores)) + (f" ± {deviation:.2f}" if deviation is not None else "")


def _interval(interval: Interval, signed: bool = False) -> str:
    if interval is None:
        return NONE
    low, high = (f"{value:{'+' if signed else ''}.2f}" for value in interval)
    return f"{low} to {high}"


def _p(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"
