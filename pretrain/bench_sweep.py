"""`bench --sweep`: our step over micro batches, ranks, ZeRO stages and nodes, a process group of its own for each setting.

With `micro` sequences a rank whatever the number of ranks this is weak scaling; with `train.global_batch_size=N` among the
overrides the step stays the same and is cut over more ranks: strong scaling. On one machine torchrun starts the ranks;
`--launch` says how to start them elsewhere, such as 'srun --nodes {nodes} --ntasks {ranks} python' in an allocation: `ranks`
are those of all nodes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log
from pretrain.config import load_config

KEYS = {"micro": "train.micro_batch_size", "stage": "deepspeed.zero_stage"}  # the others are given to the launcher
AXES = ("nodes", "ranks", "stage", "micro")
DEFAULT_LAUNCH = f"{shlex.quote(sys.executable)} -m torch.distributed.run --nproc_per_node {{ranks}}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb that belong to sweeps."""
    parser.add_argument(
        "--sweep", nargs="+", metavar="AXIS=A,B", help="measure ours at every combination of micro=, ranks=, stage=, nodes="
    )
    parser.add_argument(
        "--launch", default=DEFAULT_LAUNCH, metavar="COMMAND", help="starts {ranks} on {nodes}; default: torchrun"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of a sweep: where sweep.csv, sweep.json and sweep.png go")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every combination; one that fails (memory, too many ranks) is a row without a speed."""
    if args.out is None:
        raise InputError("--sweep needs --out DIR")
    config = load_config(args.config, ["run_dir=none", "data.path=none", *args.overrides])
    axes = parse(args.sweep, config.deepspeed.zero_stage, config.train.micro_batch_size)
    if max(axes["nodes"]) > 1 and "{nodes}" not in args.launch:
        raise InputError("--sweep nodes=N needs --launch with {nodes}: torchrun starts ranks of this machine only")
    try:
        args.launch.format(nodes=1, ranks=1, stage=1, micro=1)
    except (KeyError, ValueError, IndexError):
        raise InputError(f"--launch {args.launch!r}: names are {{nodes}}, {{ranks}}, {{stage}} and {{micro}}") from None
    rows = []
    for values in itertools.product(*axes.values()):
        row: dict[str, Any] = dict(zip(axes, values, strict=True))
        row |= _measure(args, row)
        rows.append(row)
        speed = row["tokens_per_second"]
        what = " ".join(f"{axis} {row[axis]}" for axis in AXES)
        log(f"{what:36} " + (f"{speed:12,.0f} tokens/s" if speed else f"failed: {row['error']}"))
    add_efficiency(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "sweep.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*AXES, *(key for key in rows[0] if key not in AXES)])
        writer.writeheader()
        writer.writerows(rows)
    (args.out / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, args.out / "sweep.png")
    return {"rows": rows, "out": str(args.out)}


def parse(texts: list[str], stage: int, micro: int) -> dict[str, list[int]]:
    """`micro=8,16 ranks=1,2` as {axis: values}; one that isn't named has one value: 1 node, 1 rank, `stage`, `micro`."""
    axes = {"nodes": [1], "ranks": [1], "stage": [stage], "micro": [micro]}
    for text in texts:
        axis, _, values = text.partition("=")
        if axis not in axes or not all(value.isdigit() for value in values.split(",")):
            raise InputError(f"--sweep {text}: expected one of {', '.join(f'{axis}=N,N' for axis in AXES)}")
        axes[axis] = [int(value) for value in values.split(",")]
    return axes


def _measure(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    overrides = [*args.overrides, *(f"{key}={row[axis]}" for axis, key in KEYS.items())]
    command = [part.format(**row) for part in shlex.split(args.launch)]
    command += ["-m", "pretrain", "bench", args.config, *overrides, "--against", "--steps", str(args.steps), "--json"]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    keys = (
        "tokens_per_second",
        "tokens_per_second_per_rank",
        "step_seconds",
        "mfu",
        "share_in_products",
        "memory_gb",
        "error",
    )
    found: dict[str, Any] = dict.fromkeys(keys)
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines()
        found["error"] = next((line for line in reversed(errors) if "rror" in line), f"status {done.returncode}")[:200]
        return found
    result = json.loads(lines[-1])
    speed, started = result["tokens_per_second"]["ours"], result["setting"]["ranks"]
    if started != row["ranks"]:
        return found | {"error": f"--launch started {started} ranks"}
    return found | {
        "tokens_per_second": speed,
        "tokens_per_second_per_rank": speed / row["ranks"],
        "step_seconds": result["step_seconds"]["ours"],
        "mfu": result["mfu"],
        "share_in_products": result["shares"]["matrix_products"],
        "memory_gb": result["memory_gb"],
    }


def add_efficiency(rows: list[dict[str, Any]]) -> None:
    """Speed a rank, relative to the same stage and micro batch on the fewest ranks that were measured."""
    for row in rows:
        alike = [
            other
            for other in rows
            if (other["stage"], other["micro"]) == (row["stage"], row["micro"]) and other["tokens_per_second"]
        ]
        base = min(alike, key=lambda other: other["ranks"], default=None)
        speed = row["tokens_per_second_per_rank"]
        row["efficiency"] = None if base is None or speed is None else speed / base["tokens_per_second_per_rank"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels: speed by micro batch, a line a stage and number of ranks; and speed by ranks, with the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    whole = [row for row in rows if row["tokens_per_second"]]
    for stage, ranks in sorted({(row["stage"], row["ranks"]) for row in whole}):
        line = sorted((r["micro"], r["tokens_per_second"]) for r in whole if (r["stage"], r["ranks"]) == (stage, ranks))
        left.plot(*zip(*line, strict=True), marker="o", label=f"ZeRO {stage}, {ranks} rank{'s' * (ranks > 1)}")
    left.set(xlabel="sequences a micro batch", ylabel="real tokens a second, all ranks", xscale="log")
    left.set_ylim(bottom=0)
    _ticks(left, {row["micro"] for row in whole})
    left.legend(frameon=False)
    for stage, micro in sorted({(row["stage"], row["micro"]) for row in whole}):
        line = sorted((r["ranks"], r["tokens_per_second"]) for r in whole if (r["stage"], r["micro"]) == (stage, micro))
        right.plot(*zip(*line, strict=True), marker="o", label=f"ZeRO {stage}, micro batch {micro}")
        (few, speed), most = line[0], line[-1][0]
        if most > few:
            right.plot([few, most], [speed, speed * most / few], color="0.7", linestyle=":", zorder=0)
    right.set(xlabel="ranks (dotted: in proportion)", ylabel="real tokens a second, all ranks")
    right.set_ylim(bottom=0)
    _ticks(right, {row["ranks"] for row in whole})
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ticks(axes: Any, values: set[int]) -> None:
    axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    axes.minorticks_off()
