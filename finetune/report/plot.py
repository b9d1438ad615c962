"""scores.png: every model's score on every task with its interval, the published one beside."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from data_prep.plot_style import STYLE
from finetune.report.collect import METRICS, SHOWN_PUBLISHED, Row, published_scores
from finetune.report.compare import Replicates
from finetune.report.statistics import LEVEL, interval

# Okabe and Ito's colours ("Color Universal Design", 2008), which stay apart for colour-blind readers, and a brown for their
# yellow. Markers differ too; more models than colours begin again with other markers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f4f24")
MARKERS = "os^vP>X<p"
GREY, BAND = "#555555", "#f4f4f4"
LANE = 0.13  # inches of a model
BETWEEN = 0.14  # of the gap between tasks
TALLEST = 11.0  # of a column of tasks; more tasks make a second column
LETTERS = 40  # of a task's name: those of one's own may be long


def draw(rows: Sequence[Row], replicates: Replicates) -> bytes:
    """The picture, as a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: it looks for a display and keeps figures

    tasks = list(dict.fromkeys(row.task for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    inches = LANE * (len(models) + 1) + BETWEEN  # of a task; a lane for the published score
    columns = 2 if len(tasks) * inches > TALLEST else 1
    per_column = -(-len(tasks) // columns)
    picture = io.BytesIO()
    with rc_context(STYLE):
        legend_rows = -(-(len(models) + 3) // (3 * columns))
        size = (8.5 * columns, per_column * inches + 1.3 + 0.22 * legend_rows)
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        panels = figure.subplots(1, columns, squeeze=False, sharex=True)[0]
        for number, axes in enumerate(panels):
            shown = tasks[number * per_column : (number + 1) * per_column]
            _panel(axes, shown, per_column, models, rows, replicates)
        left, right = _reach(rows, replicates)
        panels[0].set_xlim(left, right)
        figure.legend(handles=_legend(models, rows), loc="outside upper left", ncols=3 * columns, frameon=False)
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _reach(rows: Sequence[Row], replicates: Replicates) -> tuple[float, float]:
    """Ends of the x axis: all scores and intervals, and some room."""
    values = [row.mean for row in rows if row.mean is not None]
    values += [value for row in rows if row.key in replicates for value in interval(replicates[row.key])]
    published = published_scores()
    values += [published[row.task][SHOWN_PUBLISHED[0]] for row in rows if row.task in published]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    room = 0.05 * max(high - low, 4.0)
    return low - 1.6 * room, high + room


def _panel(
    axes: Any, tasks: Sequence[str], size: int, models: Sequence[str], rows: Sequence[Row], replicates: Replicates
) -> None:
    """Some of the tasks, the first at the top."""
    metrics = {row.task: METRICS[row.metric] for row in rows}
    by_key, published = {row.key: row for row in rows}, published_scores()
    lanes = len(models) + 1 + BETWEEN / LANE
    for number, task in enumerate(tasks):
        if number % 2 == 0:
            axes.axhspan(number - 0.5, number + 0.5, color=BAND, linewidth=0, zorder=0)
        for lane, model in enumerate(models):
            if row := by_key.get((task, model)):
                _mark(axes, row, number + (lane - len(models) / 2) / lanes, replicates, _look(models.index(model)))
        if task in published:
            y = number + (len(models) / 2) / lanes
            axes.plot(published[task][SHOWN_PUBLISHED[0]], y, **PUBLISHED_LOOK)
    labels = [_short(task) + ("" if metrics[task] == METRICS["mcc"] else f"\n{metrics[task]}") for task in tasks]
    axes.set_yticks(range(len(tasks)), labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(size - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test score x 100 (Matthews correlation where nothing else is said)")


PUBLISHED_LOOK: dict[str, Any] = {
    "linestyle": "", "marker": "D", "markersize": 6, "markerfacecolor": "white", "markeredgecolor": "black", "zorder": 4,
}  # fmt: skip
LOST_LOOK: dict[str, Any] = {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.8}


def _mark(axes: Any, row: Row, y: float, replicates: Replicates, look: dict[str, Any]) -> None:
    """A score with its interval; at the left edge a cross where runs are missing from it."""
    if row.mean is not None:
        if row.key in replicates:
            axes.plot(interval(replicates[row.key]), (y, y), color=look["color"], linewidth=1.6, solid_capstyle="butt")
        axes.plot(row.mean, y, linestyle="", markersize=6, markeredgecolor="white", markeredgewidth=0.5, zorder=3, **look)
    if row.collapsed or row.failed:
        axes.plot(0.012, y, color=look["color"], transform=axes.get_yaxis_transform(), clip_on=False, **LOST_LOOK)


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _legend(models: Sequence[str], rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_short(model), linewidth=1.6, **_look(index)) for index, model in enumerate(models)]
    if any(row.task in published_scores() for row in rows):
        handles.append(Line2D([], [], label=f"{SHOWN_PUBLISHED[0]}, published", **PUBLISHED_LOOK))
    if any(row.collapsed or row.failed for row in rows):
        handles.append(Line2D([], [], label="runs that collapsed or failed, not in the mean", color=GREY, **LOST_LOOK))
    return [*handles, Line2D([], [], label=f"{LEVEL} % interval", color=GREY, linewidth=1.6)]


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"
