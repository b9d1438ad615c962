"""Validation bits a base against training FLOPs, tokens and bases, from run directories: curves.csv and curves.png.

metrics.jsonl has steps alone, so each run's batches are read again, in their order and with their masks, and counted.
Dotted lines are the token frequencies of finals.csv, which finals.py has written to the same directory. Runs that stand in
curves.csv and are not given stay there.

    python benchmarks/learning-curves/curves.py RUN_DIR... --out benchmarks/learning-curves
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from data_prep.codec import Codec
from data_prep.plot_style import STYLE
from pretrain.config import load_config
from pretrain.flops import training_flops
from pretrain.loader import Loader, open_dataset
from pretrain.metrics import read_metrics

BITS = "validation_bits_per_base"
COLUMNS = ("run", "step", "tokens", "bases", "flops", BITS)
COLOURS = {"bpe": "#0072b2", "kmer": "#d55e00", "overlap": "#009e73"}  # of Okabe and Ito
# Panels: title, whether a run belongs, limits of the ordinate. The overlapping runs begin at the bits of a whole token.
PANELS = (
    ("About 4,100 tokens: BPE and 6-mers", lambda name: "4096" in name or "kmer6" in name, (1.88, 2.13)),
    ("About 260 tokens: BPE and 4-mers", lambda name: "256" in name or "kmer4" in name, (1.88, 2.13)),
    ("Overlapping 6-mers and 4-mers (another ordinate, another question)", lambda name: "overlap" in name, (0, 8.5)),
)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """A row (COLUMNS) a validation: what training had processed until then."""
    config, dataset = open_dataset(load_config(str(run_dir / "config.yaml")))
    codec, loader = Codec(dataset.tokenizer_path), Loader(config, dataset, rank=0, ranks=1)
    bits = {record["step"]: record[BITS] for record in read_metrics(run_dir / "metrics.jsonl") if BITS in record}
    tokens = squares = logits = bases = 0
    rows = []
    for step, batches in zip(range(1, max(bits) + 1), loader.steps(0), strict=False):
        for batch in batches:
            ids_t, lengths_b = batch.packed.ids_t.numpy().copy(), batch.packed.cu_seqlens.diff().numpy().astype(int)
            ids_t[batch.index_m.numpy()] = batch.labels_m.numpy()
            tokens += len(ids_t)
            squares += int((lengths_b**2).sum())
            logits += len(batch.labels_m)
            bases += int(codec.token_bases[ids_t].sum()) + codec.overlap * len(lengths_b)
        if step in bits:
            flops = training_flops(config.model, tokens, squares, logits)
            rows.append(dict(zip(COLUMNS, (run_dir.name, step, tokens, bases, flops, round(bits[step], 5)), strict=True)))
    return rows


def read_curves(file: Path) -> list[list[dict[str, Any]]]:
    """What `curve` gave for each run of the file; none where there is no file."""
    if not file.exists():
        return []
    with file.open() as lines:
        rows = [
            {name: text if name == "run" else float(text) for name, text in row.items()} for row in csv.DictReader(lines)
        ]
    for row in rows:
        row |= {name: int(row[name]) for name in COLUMNS[1:5]}
    return [list(group) for _, group in itertools.groupby(rows, lambda row: row["run"])]


def frequencies(file: Path) -> dict[str, float]:
    """Bits a base of `token frequencies` by the run on whose validation they were taken."""
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] == "token frequencies"]
    return {row["run"]: float(row["bits_per_base"]) for row in rows}


def draw(curves: list[list[dict[str, Any]]], plain: dict[str, float], out: Path) -> None:
    """Bits over FLOPs, a panel a group; later seeds dashed, overlapping 4-mers light. `plain`: of `frequencies`."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 7.5), dpi=90, layout="constrained")
        mosaic = figure.subplot_mosaic([[0, 1], [2, 2]], height_ratios=[1.2, 1])
        for number, (title, belongs, limits) in enumerate(PANELS):
            axes = mosaic[number]
            for rows in curves:
                name = rows[0]["run"]
                if not belongs(name):
                    continue
                colour = next(colour for kind, colour in COLOURS.items() if name.startswith(kind))
                look: dict[str, Any] = {
                    "linestyle": "-" if name.endswith("s0") else "--",
                    "alpha": 0.55 if "overlap4" in name else 1,
                }
                axes.plot([row["flops"] for row in rows], [row[BITS] for row in rows], label=name, color=colour, **look)
                if name.endswith("s0") and name in plain:
                    label = f"{name.removesuffix('-s0')}, token frequencies"
                    axes.axhline(plain[name], color=colour, linestyle=":", linewidth=1.2, label=label)
            axes.axhline(2.0, color="#808080", linewidth=0.8, zorder=0)
            axes.set(
                title=title, xlabel="training FLOPs (matrix products)", ylabel="bits a hidden base", ylim=limits, xlim=0
            )
            axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)
        figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR")
    args = parser.parse_args()
    curves = {rows[0]["run"]: rows for rows in read_curves(args.out / "curves.csv")}
    curves |= {run_dir.name: curve(run_dir) for run_dir in args.run_dirs}
    with (args.out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for rows in curves.values() for row in rows)
    draw(list(curves.values()), frequencies(args.out / "finals.csv"), args.out / "curves.png")


if __name__ == "__main__":
    main()
