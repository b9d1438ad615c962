"""`python -m finetune attention`: where a model looks, in one sequence, layer by layer and head by head.

The weights are softmax(q k^T / sqrt(D) - slope |i - j|) of each layer and head, in fp32 by PyTorch, from the queries and
keys that the layer itself computes: kernels keep no weights. The model's input is the sequence with [CLS] and [SEP].

    DIR/attention.npz   `weights` fp32 [layers, heads, t, t], a row a query; `head_mean` [layers, t, t]; `layers`;
                        `tokens` [t]; `starts` [t]: the base at which each token begins, -1 for [CLS] and [SEP]
    DIR/attention.png   the mean over heads of each layer, the heads of one layer, and what each base receives
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.cli import InputError, log, replacing, write_atomically
from data_prep.plot_style import STYLE
from finetune.inference import Opened, add_model_arguments, open_model
from finetune.sequences import COLUMN, Named, find_sequence
from kernels import alibi_slopes

MOST_BYTES = 4 * 10**9  # of weights
FEW_TOKENS = 32  # up to which each is named at the axes
PANEL_CELLS = 512  # along a side of a map; larger ones are averaged down to it before they are drawn
COLUMNS = 6  # of maps, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sequence", metavar="ACGT", help="the sequence itself, its letters as they are")
    source.add_argument("--input", type=Path, metavar="FILE", help="FASTA, or CSV with a header line; plain or gzip")
    parser.add_argument(
        "--record",
        metavar="NAME",
        help="which record of --input (row-1, ... of a CSV file), or NAME:START-END, a part of it",
    )
    parser.add_argument("--column", default=COLUMN, metavar="NAME", help=f"of a CSV file: the sequences (default: {COLUMN})")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets attention.npz and attention.png")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="which layers, from 0 (default: all)")
    parser.add_argument(
        "--heads-of", type=int, metavar="N", help="layer whose heads are drawn (default: the last of --layers)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb."""
    if args.sequence is not None and args.record is not None:
        raise InputError("--record goes with --input")
    opened = open_model(args.model, dtype=args.dtype, kernels=args.kernels)
    layers = list(range(opened.config.num_hidden_layers)) if args.layers is None else args.layers
    heads_of = layers[-1] if args.heads_of is None else args.heads_of
    if heads_of not in layers:
        raise InputError(f"--heads-of {heads_of}: not among the layers {' '.join(map(str, layers))}")
    if args.sequence is not None:
        sequence = Named("sequence", args.sequence.strip(), "--sequence")
    else:
        sequence = find_sequence(args.input, args.record, column=args.column, most=opened.encoder.most_bases)
    maps = attention_maps(opened, sequence, layers)
    with replacing(args.out / "attention.npz") as stream:
        np.savez(
            stream,
            weights=maps.weights,
            head_mean=maps.head_mean,
            layers=np.array(maps.layers),
            tokens=np.array(maps.tokens),
            starts=maps.starts,
        )
    write_atomically(args.out / "attention.png", draw(maps, heads_of, Path(opened.where).name))
    log(f"{args.out}: {len(layers)} layers of {opened.config.num_attention_heads} heads, {len(maps.tokens)} tokens")
    return opened.about() | {
        "out": str(args.out),
        "sequence": sequence.name,
        "bases": maps.bases,
        "tokens": len(maps.tokens),
        "layers": maps.layers,
    }


@dataclass(frozen=True)
class Maps:
    """Attention within one sequence of t tokens."""

    name: str
    bases: int
    layers: list[int]
    weights: NDArray[np.float32]  # [layers, heads, t, t], a row a query
    head_mean: NDArray[np.float32]  # [layers, t, t]
    tokens: list[str]  # [t]
    starts: NDArray[np.int64]  # [t], -1 for [CLS] and [SEP]

    def received(self) -> NDArray[np.float64]:
        """What each token gets of all attention in each layer, in multiples of an even share [layers, t]."""
        return self.head_mean.mean(1, dtype=np.float64) * len(self.tokens)


def attention_maps(opened: Opened, sequence: Named, layers: Sequence[int]) -> Maps:
    """The weights of these layers. InputError for a layer that isn't there, and where the weights take over MOST_BYTES."""
    depth, heads = opened.config.num_hidden_layers, opened.config.num_attention_heads
    if len(set(layers)) < len(layers) or not all(0 <= layer < depth for layer in layers):
        raise InputError(f"--layers {' '.join(map(str, layers))}: give each once; the model's are 0 to {depth - 1}")
    (ids,), _ = opened.encode([sequence])
    batch = opened.packed([ids])
    t = len(batch.ids_t)
    size = len(layers) * heads * t * t * 4
    if size > MOST_BYTES:
        raise InputError(
            f"{sequence.where}: {len(layers)} layers of {heads} heads over {t:,} tokens are {size / 1e9:.1f} GB of weights, "
            f"over {MOST_BYTES / 1e9:g} GB; give fewer --layers or a shorter sequence"
        )
    weights = np.empty((len(layers), heads, t, t), dtype=np.float32)
    with ExitStack() as hooks, opened.precision():
        for place, layer in enumerate(layers):
            linear = opened.model.get_submodule(f"bert.encoder.layer.{layer}.attention.self.Wqkv")
            hooks.callback(linear.register_forward_hook(partial(_keep, weights[place])).remove)
        opened.model.bert(batch)
    return Maps(
        sequence.name,
        len(sequence.text),
        list(layers),
        weights,
        weights.mean(1, dtype=np.float32),
        [str(opened.tokenizer.id_to_token(token)) for token in batch.ids_t.tolist()],
        np.concatenate([[-1], opened.token_starts(sequence.text, ids)[:-1], [-1]]),
    )


def _keep(out_htt: NDArray[np.float32], module: nn.Module, inputs: Any, qkv_td: Tensor) -> None:
    """Put a layer's weights into `out_htt`; one head after the other, since each takes t x t numbers several times."""
    heads, t = len(out_htt), len(qkv_td)
    with torch.autocast(qkv_td.device.type, enabled=False):
        q_htd, k_htd, _ = qkv_td.float().view(t, 3, heads, -1).permute(1, 2, 0, 3)
        position = torch.arange(t, device=qkv_td.device)
        distance_tt = (position[:, None] - position).abs()
        for head, slope in enumerate(alibi_slopes(heads)):
            scores_tt = q_htd[head] @ k_htd[head].T / math.sqrt(q_htd.shape[-1]) - slope * distance_tt
            out_htt[head] = scores_tt.softmax(-1).cpu().numpy()


def draw(maps: Maps, heads_of: int, model: str) -> bytes:
    """The picture, as a PNG: maps over layers, maps over heads, and the attention along the sequence."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layer_maps = {f"layer {layer}": maps.head_mean[place] for place, layer in enumerate(maps.layers)}
    place = maps.layers.index(heads_of)
    head_maps = {f"head {head}": weights for head, weights in enumerate(maps.weights[place])}
    columns = max(3, min(COLUMNS, max(len(layer_maps), len(head_maps))))
    rows = [math.ceil(len(group) / columns) for group in (layer_maps, head_maps)]
    side = 2.9 if len(maps.tokens) <= FEW_TOKENS else 2.2  # inches of a map
    heights = [side * rows[0] + 0.6, side * rows[1] + 0.6, 3.2]
    with rc_context(STYLE | {"axes.grid": False, "font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(columns * side + 1, sum(heights) + 0.5), dpi=110, layout="constrained")
        figure.suptitle(
            f"{model}: attention within {maps.name} ({maps.bases:,} bases, {len(maps.tokens):,} tokens)", fontsize=11
        )
        above, middle, below = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
        _grid(above, columns, layer_maps, maps, "Mean over the heads of each layer; rows look at columns")
        _grid(middle, columns, head_maps, maps, f"The heads of layer {heads_of}")
        _along(below, maps)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _grid(figure: Any, columns: int, group: dict[str, NDArray[np.float32]], maps: Maps, title: str) -> None:
    """Maps side by side under one logarithmic scale; what is below a tenth of an even share is white."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    t = len(maps.tokens)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    panels = figure.subplots(math.ceil(len(group) / columns), columns, squeeze=False)
    small = {name: _shrunk(weights) for name, weights in group.items()}
    norm = LogNorm(0.1 / t, max(float(weights.max()) for weights in small.values()), clip=False)
    colours = colormaps["viridis_r"].with_extremes(under="white")
    image = None
    for number, axes in enumerate(panels.flat):
        if number >= len(group):
            axes.set_axis_off()
            continue
        name, weights = list(small.items())[number]
        image = axes.imshow(weights, norm=norm, cmap=colours, extent=(-0.5, t - 0.5, t - 0.5, -0.5))
        axes.set_title(name)
        below_it = number + columns >= len(group)
        _ticks(axes.yaxis, maps, number % columns == 0)
        _ticks(axes.xaxis, maps, below_it)
    figure.colorbar(image, ax=panels[:, : len(group)].ravel().tolist(), shrink=0.9, pad=0.01, label="attention weight")


def _shrunk(weights_tt: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most PANEL_CELLS a side: means of squares of cells."""
    t = len(weights_tt)
    if t <= PANEL_CELLS:
        return weights_tt
    edges = np.linspace(0, t, PANEL_CELLS, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(edges, t))
    sums = np.add.reduceat(np.add.reduceat(weights_tt, edges, 0), edges, 1)
    return sums / (sizes[:, None] * sizes)


def _ticks(axis: Any, maps: Maps, named: bool) -> None:
    """Tokens where they are few, else places in bases, at the outer maps only."""
    t = len(maps.tokens)
    if t <= FEW_TOKENS:
        axis.set_ticks(range(t), maps.tokens if named else [""] * t, fontsize=6)
        if named and axis.axis_name == "x":
            axis.set_tick_params(rotation=90)
        return
    from matplotlib.ticker import MaxNLocator

    places = [place for place in MaxNLocator(4, integer=True).tick_values(0, maps.bases) if 0 <= place <= maps.bases]
    at = np.searchsorted(maps.starts[1:-1], places, side="right")  # [CLS] is token 0
    axis.set_ticks(at, [f"{int(place):,}" for place in places] if named else [""] * len(at))
    if named:
        axis.set_label_text("base")


def _along(figure: Any, maps: Maps) -> None:
    """What the tokens receive, over the bases where they stand."""
    from matplotlib import colormaps

    axes = figure.subplots()
    received = maps.received()
    shares = received.mean(0) / len(maps.tokens)
    figure.suptitle(
        f"Attention that a token receives, in even shares (1/{len(maps.tokens):,}); "
        f"not shown: [CLS] receives {shares[0]:.1%} of all, [SEP] {shares[-1]:.1%}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    edges = np.append(maps.starts[1:-1], maps.bases)
    for place, layer in enumerate(maps.layers):
        colour = colormaps["viridis_r"](0.1 + 0.9 * place / max(len(maps.layers) - 1, 1))
        look = {"color": colour, "linewidth": 0.7, "alpha": 0.7, "label": f"layer {layer}"}
        axes.stairs(received[place, 1:-1], edges, baseline=None, **look)
    if len(maps.layers) > 1:
        axes.stairs(received[:, 1:-1].mean(0), edges, baseline=None, color="black", linewidth=1.4, label="mean")
    if len(maps.tokens) <= FEW_TOKENS:
        for token, place in zip(maps.tokens[1:-1], (edges[:-1] + edges[1:]) / 2, strict=True):
            axes.annotate(token, (place, 0.02), xycoords=("data", "axes fraction"), ha="center", rotation=90, fontsize=6)
    axes.axhline(1, color="#888888", linewidth=0.6, linestyle=":")
    axes.set_xlim(0, maps.bases)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("base")
    axes.set_ylabel("even shares")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
