"""The pictures of a dataset's report, each as the bytes of a PNG. matplotlib is imported inside: that takes a second.

Groups are categories of species; beyond eleven, the smallest are drawn together, so that a picture stays one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.plot_style import STYLE

GROUPS = 11  # drawn by themselves
BARS = 30  # of a chart of species
LENGTHS = 8  # of tokens, that an axis has room for at least: few lengths must not make fat bars
LETTERS = 44  # of a name beside a plot
# Okabe and Ito's colours ("Color Universal Design", 2008), which stay apart for colour-blind readers, then darker ones.
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#7f4f24",
    "#5e4fa2",
    "#66a61e",
    "#1b9e9e",
)
GREY = "#999999"


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure to draw on, and the buffer that holds its PNG afterwards."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: it looks for a display and keeps figures

    picture = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        yield figure, picture
        figure.savefig(picture, format="png")


def colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each group; grey for what is drawn together."""
    return {group: COLOURS[number] if number < GROUPS else GREY for number, group in enumerate(groups)}


def short(name: str) -> str:
    """The name, or its end: names of species that are paths differ there."""
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"


def tokens(
    token_bases: NDArray[np.int64], uses: NDArray[np.float64], length_counts: NDArray[np.float64], overlap: int = 0
) -> bytes:
    """How long tokens and sequences are.

    Args:
        token_bases: [vocabulary] bases by which each token moves on, 0 for special ones.
        uses: [vocabulary] how often each occurs.
        length_counts: [lengths] sequences by their content tokens, from 0.
        overlap: letters that a token shares with the next, k - 1 for overlapping k-mers.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    content = token_bases > 0
    letters = token_bases[content] + overlap
    used, there = np.bincount(letters, uses[content]), np.bincount(letters)
    used, there = 100 * used / max(1, used.sum()), 100 * there / there.sum()
    with _figure(11, 4.2) as (figure, picture):
        left, right = figure.subplots(1, 2)
        x = np.arange(len(used))
        left.bar(x - 0.2, used, width=0.4, color=COLOURS[0], label="of the tokens in the data")
        left.bar(x + 0.2, there, width=0.4, color=COLOURS[4], label="of the vocabulary")
        shared = f", of which the next token shares {overlap}" if overlap else ""
        left.set(title="Token length", xlabel=f"letters of a token{shared}", ylabel="%")
        left.set_xlim(0.4, max(len(used) - 1, LENGTHS) + 0.6)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.grid(axis="x", visible=False)
        # Beside the title, where no bar reaches.
        left.legend(loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=2, frameon=False, fontsize=9, columnspacing=1)
        size = -(-len(length_counts) // 64)  # lengths a bar
        # The longest length ends a bar: where most sequences are full, it must not stand beside empty ones.
        edges = np.unique(np.append(1, np.arange(len(length_counts), 0, -size)))
        counts = np.add.reduceat(length_counts, edges[:-1])
        right.stairs(counts, edges - 0.5, fill=True, color=COLOURS[0])
        full = 100 * length_counts[-1] / max(1, length_counts.sum())
        title = f"Sequence length; {full:.1f} % are full" if full >= 1 else "Sequence length"
        right.set(title=title, xlabel="tokens, without [CLS] and [SEP]", ylabel="sequences", yscale="log")
        right.set_xlim(0, len(length_counts))
        right.set_ylim(bottom=0.7)
        right.yaxis.set_major_formatter(EngFormatter(sep=""))
        right.yaxis.set_minor_formatter(NullFormatter())
    return picture.getvalue()


def gc(groups: Sequence[str], histograms: NDArray[np.float64], means: Sequence[float], all_groups: Sequence[str]) -> bytes:
    """Share of G and C in sequences: a curve a group, one above the other.

    Args:
        histograms: [groups, bins] sequences, bins of equal width from 0 to 100 %.
        means: [groups] per cent, of all bases.
        all_groups: those of the other plots, which give the colours.
    """
    shade = colours(all_groups)
    bins = histograms.shape[1]
    x = (np.arange(bins) + 0.5) * 100 / bins
    with _figure(9, 1.2 + 0.55 * len(groups)) as (figure, picture):
        axes = figure.subplots()
        for row, (group, counts) in enumerate(zip(groups, histograms, strict=True)):
            base, height = len(groups) - 1 - row, 0.93 * counts / max(1.0, float(counts.max()))
            axes.fill_between(x, base, base + height, color=shade[group], linewidth=0)
            axes.text(100.5, base, f"{means[row]:.1f} %", va="bottom", color="#333333")
        axes.set_yticks(range(len(groups)), [short(group) for group in reversed(groups)], va="bottom")
        axes.tick_params(axis="y", length=0)
        axes.set(
            title="G + C of the training sequences; beside each group the mean of its bases", xlabel="G + C of a sequence, %"
        )
        axes.set_xlim(0, 100)
        axes.set_ylim(0, len(groups))
        axes.spines["left"].set_visible(False)
    return picture.getvalue()


def dropped(groups: Sequence[str], reasons: Sequence[str], shares: NDArray[np.float64], labels: Sequence[str]) -> bytes:
    """Why bases were left out: a bar a group, stacked by reason.

    Args:
        reasons: all there can be, always in the same order, which gives the colours.
        shares: [groups, reasons] per cent of the group's bases.
        labels: [groups] written to the right of each bar.
    """
    with _figure(9, 1.6 + 0.36 * len(groups)) as (figure, picture):
        axes = figure.subplots()
        left, y = np.zeros(len(groups)), np.arange(len(groups))
        reach = min(100.0, 1.05 * max(float(shares.sum(axis=1).max()), 0.1))
        visible = shares.max(axis=0) >= 0.0005 * reach  # half a pixel
        for reason, colour, seen, widths in zip(reasons, COLOURS, visible, shares.T, strict=False):
            if seen:
                axes.barh(y, widths, left=left, height=0.7, color=colour, label=reason)
                left += widths
        for row, label in enumerate(labels):
            axes.text(1.01, row, label, va="center", color="#333333", transform=axes.get_yaxis_transform())
        axes.set_yticks(y, [short(group) for group in groups])
        axes.invert_yaxis()
        axes.set_xlim(0, reach)
        axes.set(xlabel="% of the group's bases")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        figure.suptitle("Bases that stand in no sequence", x=0.01, ha="left", fontsize=11)
        if visible.any():
            figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return picture.getvalue()


def species(
    names: Sequence[str], group_of: Sequence[str], groups: Sequence[str], shares: Sequence[float], others: str
) -> bytes:
    """Shares of the training tokens: a bar a species, the largest first, coloured by group.

    Args:
        group_of: [species] the group of each, one of `groups`.
        shares: [species] per cent; may be 0.
        others: what the title tells about species not drawn; empty if there are none.
    """
    from matplotlib.patches import Patch

    shade = {group: colour for group, colour in colours(groups).items() if group in group_of}
    with _figure(10.5, 1.6 + 0.24 * len(names)) as (figure, picture):
        axes = figure.subplots()
        y = np.arange(len(names))
        axes.barh(y, shares, height=0.75, color=[shade[group] for group in group_of])
        for row, share in enumerate(shares):
            label = f"{share:.2f} %" if share >= 0.005 else "< 0.01 %" if share else "0"
            axes.text(share, row, f" {label}", va="center", fontsize=8, color="#333333")
        axes.set_yticks(y, [short(name) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.1 * max(shares))
        title = "Share of the training tokens, %"
        axes.set_title(f"{title}: the {len(names)} largest species\n{others}" if others else title)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        patches = [Patch(color=colour, label=short(group)) for group, colour in shade.items()]
        figure.legend(handles=patches, loc="outside right upper", frameon=False)
    return picture.getvalue()
