"""`python -m pretrain plot`: the curves of several runs in one picture, from their metrics.jsonl alone.

Runs that are equal are the case to be seen best (a resumed run beside one that never stopped), so lines that lie on top of
each other must both show: the first run is drawn wide and light, the others narrow and dark over it, with dashes from the
third on.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log, write_atomically
from data_prep.plot_style import STYLE
from pretrain.metrics import read_metrics

# A light blue for the wide line, then of Okabe and Ito's colours ("Color Universal Design", 2008), which stay apart for
# colour-blind readers.
COLOURS = ("#9ecbf0", "#000000", "#d55e00", "#009e73", "#cc79a7", "#0072b2")
STYLES = ("-", (0, (5, 3)), (0, (2, 2)), (0, (7, 2, 1, 2)))  # of the runs after the first
FEW = 30  # points of a line up to which each is marked: one alone would not show
PANELS = {  # key of the records -> title
    "loss": "Training loss, nats a masked token",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens a second, all devices",
    "step_seconds_p50": "Seconds a step, median",
    "validation_bits_per_base": "Validation, bits a hidden base",
}
BITS = "validation_bits_per_base"  # recorded at some steps only, and not by every run
GREY = "#808080"
VALIDATION: dict[str, Any] = {"linestyle": "", "marker": "o", "markerfacecolor": "none"}
SKIPPED: dict[str, Any] = {"linestyle": "", "marker": "x"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="directories with a metrics.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("plot.png"), metavar="FILE.png", help="the picture (default: plot.png, here)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: draw and say where."""
    result = plot(args.run_dirs, args.out)
    log(f"{result['out']}: {len(result['runs'])} runs")
    return result


def plot(run_dirs: list[Path], out: Path) -> dict[str, Any]:
    """Draw loss, gradient norm, learning rate, speed and step time over the steps, a line a run, as a PNG.

    Where a run has validated, bits a base (`pretrain.bits`) stand beside the loss, with a grey line at 2: four bases equally
    likely. Values that are missing or null leave gaps. A run that has logged nothing yet stands in the legend alone.

    Returns:
        `out`, and `runs`: of each its `run_dir`, `steps` (the last one logged, 0 without any) and `last_loss` (nats a masked
        token; None where it was not finite or nothing was logged).

    Raises InputError when a directory has no metrics.jsonl.
    """
    for run_dir in run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            raise InputError(f"{run_dir / 'metrics.jsonl'}: not found; give directories of runs that have logged a step")
    runs = [read_metrics(run_dir / "metrics.jsonl") for run_dir in run_dirs]
    write_atomically(out, _draw(runs, _names(run_dirs)))
    ends = [records[-1] if records else {} for records in runs]
    return {
        "out": str(out),
        "runs": [
            {"run_dir": str(run_dir), "steps": end.get("step", 0), "last_loss": end.get("loss")}
            for run_dir, end in zip(run_dirs, ends, strict=True)
        ],
    }


def _names(run_dirs: list[Path]) -> list[str]:
    """Directory names; whole paths where two would be the same."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def _draw(runs: list[list[dict[str, Any]]], names: list[str]) -> bytes:
    """The picture, as a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: it looks for a display and keeps figures
    from matplotlib.lines import Line2D

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 9), dpi=120, layout="constrained")
        records = [record for records in runs for record in records]
        top = ["loss", BITS if any(record.get(BITS) is not None for record in records) else "loss"]
        rows: list[Any] = [top, ["grad_norm", "learning_rate"], ["tokens_per_second", "step_seconds_p50"]]
        panels: dict[str, Any] = figure.subplot_mosaic(rows, sharex=True, height_ratios=[1.5, 1, 1])
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            look = _look(number, len(runs))
            for key, axes in panels.items():
                _line(axes, [record for record in run if BITS in record] if key == BITS else run, key, label=name, **look)
            _marks(panels["loss"], run, number, look["color"])
        for key, axes in panels.items():
            _scale(axes, key, any(record.get(key) is not None for record in records))
        legend, _ = panels["loss"].get_legend_handles_labels()
        if any(record.get("validation_loss") is not None for record in records):
            legend.append(Line2D([], [], label="validation", color=GREY, **VALIDATION))
        if any(record.get("skipped_steps") for record in records):
            legend.append(Line2D([], [], label="steps skipped", color=GREY, **SKIPPED))
        figure.legend(handles=legend, loc="outside upper left", ncols=4, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        return picture.getvalue()


def _scale(axes: Any, key: str, recorded: bool) -> None:
    """Title, limits and labels of a panel."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_title(PANELS[key])
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelbottom=True)
    if not recorded:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    elif key == "grad_norm":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif key == BITS:
        axes.axhline(2.0, color=GREY, linewidth=0.8, zorder=0)  # four bases, equally likely
    elif key != "loss":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_second" else "{x:g}")


def _look(number: int, runs: int) -> dict[str, Any]:
    """Colour, width and dashes of a run's lines."""
    if runs == 1:
        return {"color": COLOURS[-1], "linewidth": 1.2}
    if number == 0:
        return {"color": COLOURS[0], "linewidth": 4.5}
    return {
        "color": COLOURS[1 + (number - 1) % (len(COLOURS) - 1)],
        "linestyle": STYLES[(number - 1) % len(STYLES)],
        "linewidth": 1.2,
    }


def _number(value: float | None) -> float:
    """NaN, which leaves a gap, for what is missing."""
    return math.nan if value is None else value


def _line(axes: Any, records: list[dict[str, Any]], key: str, **look: Any) -> None:
    values = [_number(record.get(key)) for record in records]
    few = sum(map(math.isfinite, values)) <= FEW
    steps = [record["step"] for record in records]
    axes.plot(steps, values, marker="o" if few else None, markersize=look["linewidth"] + 3, **look)


def _marks(axes: Any, records: list[dict[str, Any]], number: int, colour: str) -> None:
    """Validation as circles, the first run's larger; skipped steps as crosses along the top, a row a run."""
    validated = [record for record in records if record.get("validation_loss") is not None]
    skipped = [record["step"] for record in records if record.get("skipped_steps")]
    steps, losses = [record["step"] for record in validated], [record["validation_loss"] for record in validated]
    axes.plot(steps, losses, color=colour, markersize=9 if number == 0 else 5, **VALIDATION)
    heights = [0.96 - 0.05 * number] * len(skipped)
    axes.plot(skipped, heights, color=colour, transform=axes.get_xaxis_transform(), **SKIPPED)
