"""What `python -m kernels bench` writes: a table as CSV, and a picture with one panel an operation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kernels.bench_contenders import OURS

COPY = "copy"
# Ours in the one loud colour, the others in Okabe and Ito's ("Color Universal Design", 2008): compiled by torch, called from
# torch, a library's kernels, written out in torch, and apex.
_COMPILED, _EAGER, _LIBRARY, _PLAIN, _APEX = (
    {"color": colour, "marker": marker, "linewidth": 1.3}
    for colour, marker in zip(("#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#b8a100"), "sDv^P", strict=True)
)
LOOKS: dict[str, dict[str, Any]] = {
    OURS: {"color": "#d55e00", "marker": "o", "linewidth": 3.0, "zorder": 5},
    **{"FlexAttention": _COMPILED, "torch.compile": _COMPILED, "flash-attn": _LIBRARY, "Liger": _LIBRARY, "apex": _APEX},
    **{"SDPA with a bias": _EAGER, "eager": _EAGER, "bias tensor": _PLAIN, "plain twin": _PLAIN},
    COPY: {"color": "#777777", "linestyle": "--", "linewidth": 1.2},
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # behind numbers that lie on a line
TITLES = {
    "layer_norm": "dropout + residual + LayerNorm",
    "geglu": "GEGLU + dropout",
    "cross_entropy": "Cross entropy",
    "dropout": "Dropout",
}
NUMBERS = {"milliseconds": 9.4, "gigabytes_per_second": 9.1, "teraflops_per_second": 8.1, "fraction_of_copy": 6.2}
HEADING = (
    f"{'operation':14} {'case':17} {'p':>3} {'pass':16} {'contender':18} {'ms':>9} {'GB/s':>9} {'TFLOP/s':>8} {'of copy':>6}"
)


@dataclass(frozen=True)
class Row:
    """One contender's time for one pass over one problem; without a time where it was left out, and `note` says why.

    The rates count what the problem can't do without (`bench_contenders.Cost`), not what the contender moves. The copy's
    TFLOP/s are those of an attention that would only wait for memory.
    """

    operation: str
    case: str  # tokens a sequence, a mix of lengths, or rows x columns
    dropout_p: float
    way: str  # forward, backward, forward+backward
    contender: str
    milliseconds: float | None = None
    host_milliseconds: float | None = None  # of the CPU to start it all
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None  # attention only
    fraction_of_copy: float | None = None  # of the speed of a copy that moves as many bytes
    note: str = ""

    def __str__(self) -> str:
        line = f"{self.operation:14} {self.case:17} {self.dropout_p:3.1f} {self.way:16} {self.contender:18} "
        if self.note:
            return f"{line}left out: {self.note}"
        values = ((getattr(self, name), width) for name, width in NUMBERS.items())
        return line + " ".join(" " * int(width) if value is None else f"{value:{width}f}" for value, width in values)


def table(rows: Sequence[Row], facts: Mapping[str, str]) -> bytes:
    """CSV: a line a row; the facts of the run stand in every line."""
    text = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(text, [*names, *facts], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        numbers = {name: f"{value:.5g}" for name, value in vars(row).items() if isinstance(value, float)}
        writer.writerow({**vars(row), **numbers, **facts})
    return text.getvalue().encode()


def picture(rows: Sequence[Row], facts: Mapping[str, str], warning: str = "") -> bytes:
    """A PNG: attention over the length in TFLOP/s, forward and with backward; the others as fractions of a copy."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: it looks for a display and keeps figures

    timed = [row for row in rows if row.milliseconds is not None]
    attention = [row for row in timed if row.operation == "attention"]
    others = [name for name in TITLES if any(row.operation == name for row in timed)]
    heights = [height for height, wanted in ((4.8, attention), (4.8, others)) if wanted]
    with rc_context(STYLE):
        figure = Figure(figsize=(13, sum(heights) + 0.6), dpi=110, layout="constrained")
        shown = ("device", "dtype", "driver", "cuda", "torch", "triton", "python", "commit")
        title = " · ".join(facts[name] if name == "device" else f"{name} {facts[name]}" for name in shown if facts.get(name))
        figure.suptitle(f"{title}\n{warning.upper()}" if warning else title, color="#cc0000" if warning else "black")
        halves = iter(figure.subfigures(len(heights), 1, squeeze=False)[:, 0] if heights else ())
        if attention:
            half = next(halves)
            for axes, way in zip(half.subplots(1, 2), ("forward", "forward+backward"), strict=True):
                _lines(axes, [row for row in attention if row.way == way])
                axes.set_title(f"Attention with ALiBi, {way}: TFLOP/s over tokens a sequence")
            _legend(half, attention)
        if others:
            half = next(halves)
            for axes, name in zip(half.subplots(1, len(others), squeeze=False)[0], others, strict=True):
                group = [row for row in timed if row.operation == name and row.way != "backward"]
                _bars(axes, group)
                axes.set_title(f"{TITLES[name]}\n{group[0].case}")
            _legend(half, [row for row in timed if row.operation in others])
        image = io.BytesIO()
        figure.savefig(image, format="png")
        return image.getvalue()


def _legend(figure: Any, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    names = [name for name in LOOKS if any(row.contender == name for row in rows)]
    handles = [Line2D([], [], label="a copy's speed" if name == COPY else name, **LOOKS[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _lines(axes: Any, rows: Sequence[Row]) -> None:
    """Attention: lengths joined by lines, mixes of lengths as points beside them."""
    cases = list(dict.fromkeys(row.case for row in rows))
    for name, look in LOOKS.items():
        speeds = {row.case: row.teraflops_per_second for row in rows if row.contender == name}
        joined = [case for case in speeds if case.isdigit()]
        single = [case for case in speeds if not case.isdigit()]
        axes.plot([cases.index(case) for case in joined], [speeds[case] for case in joined], **look)
        marker = {"marker": "_", **look, "linestyle": "", "markersize": 8}
        axes.plot([cases.index(case) for case in single], [speeds[case] for case in single], **marker)
    reached = [row.teraflops_per_second or 0.0 for row in rows if row.contender != COPY]
    axes.set_ylim(0, 1.12 * max(reached, default=1.0))  # the copy's line leaves the picture
    axes.set_xticks(range(len(cases)), [case.replace("-", "-\n").replace(" ", "\n") for case in cases])


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """A group of bars for each pass and dropout probability, a bar a contender, its number at its end."""
    rows = sorted((row for row in rows if row.contender != COPY), key=lambda row: list(LOOKS).index(row.contender))
    place, ticks = 0.0, []
    several = len({row.dropout_p for row in rows}) > 1
    for way in ("forward", "forward+backward"):
        for p in sorted({row.dropout_p for row in rows}):
            group = [row for row in rows if (row.way, row.dropout_p) == (way, p)]
            ticks.append((place + (len(group) - 1) / 2, way.replace("+", "\n+ ") + (f"\np = {p:g}" if several else "")))
            for row in group:
                value = row.fraction_of_copy or 0.0
                axes.barh(place, value, height=0.86, color=LOOKS[row.contender]["color"])
                number = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
                axes.annotate(f"{value:.2f}", (value, place), bbox=WHITE, **number)
                place += 1
            place += 0.8
    axes.axvline(1, **LOOKS[COPY])
    axes.set_xlim(0, 1.15 * max(1.0, *(row.fraction_of_copy or 0.0 for row in rows)))
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("speed, as a fraction of a copy's")
