"""`python -m finetune <verb>`: what a pre-trained model is worth on the Genome Understanding Evaluation (GUE)."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.cli import add_verb, main
from finetune.report import report
from finetune.run import run as run_once
from finetune.suite import gue

# Flag, type, help; the default is the task's own.
SETTINGS: tuple[tuple[str, type, str], ...] = (
    ("--learning-rate", float, "reached after the warm-up, then linear to 0"),
    ("--batch-size", int, "sequences a step"),
    ("--epochs", int, "the run ends after these or --max-steps, whichever comes first"),
    ("--max-steps", int, "most steps"),
    ("--warmup-steps", int, "steps over which the learning rate rises from 0"),
    ("--weight-decay", float, "of matrices (AdamW)"),
    ("--eval-every", int, "steps between evaluations on dev"),
    ("--max-length", int, "truncate to this many tokens, [CLS] and [SEP] included (default: nothing is truncated)"),
)


def run_run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune once."""
    return run_once(args.model, args.task, args.out, seed=args.seed, **_shared_options(args))


def run_gue(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune on all tasks with several seeds."""
    return gue(
        args.model,
        args.data,
        args.out,
        seeds=args.seeds,
        num_tasks=args.num_tasks,
        task=args.task,
        names=args.tasks,
        **_shared_options(args),
    )


def run_report(args: argparse.Namespace) -> dict[str, Any]:
    """Make tables."""
    return report(args.results, args.out)


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m finetune", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = add_verb(
        verbs,
        "run",
        run_run,
        "Fine-tune one model on one task with one seed: all weights, the best by dev loss, scored once on test. "
        "A run that is done already is not done again.",
    )
    verb.add_argument(
        "--task",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of train.csv, dev.csv, test.csv, such as GUE/tf/0",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="order, dropout, fresh weights (default: 0)")
    _add_shared(verb, argv)

    verb = add_verb(
        verbs,
        "gue",
        run_gue,
        "Fine-tune one model on all tasks below a folder with several seeds. Runs that are done already are not done again; "
        "one that fails doesn't keep the others from being done.",
    )
    verb.add_argument(
        "--data", type=Path, required=True, metavar="GUE_DIR", help="folder with folders of the three CSV files"
    )
    verb.add_argument("--seeds", type=int, default=3, metavar="S", help="runs a task, with seeds 0 to S - 1 (default: 3)")
    verb.add_argument("--tasks", nargs="+", metavar="TASK", help="only these, such as tf/0 mouse/1 (default: all)")
    verb.add_argument("--num-tasks", type=int, metavar="N", help="elements of a job array that share the runs")
    verb.add_argument("--task", type=int, metavar="I", help="number of this element, from 0")
    _add_shared(verb, argv)

    verb = add_verb(verbs, "report", run_report, "Make table.md and table.csv of all runs below a results folder.")
    verb.add_argument("results", type=Path, metavar="RESULTS", help="the --out of the runs")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the tables")
    return parser


def _add_shared(verb: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """What one run and many take alike; `_shared_options` hands it on."""
    verb.set_defaults(command_line=shlex.join(["python", "-m", "finetune", *(sys.argv[1:] if argv is None else argv)]))
    verb.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a run directory of `pretrain train`, a Hugging Face directory, or `random`: without pre-training",
    )
    verb.add_argument(
        "--like",
        metavar="MODEL",
        help="with --model random: give the random weights the architecture and tokenizer of MODEL "
        "(default: the tiny preset, and a tokenizer trained on the task)",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="RESULTS", help="folder for the results of all runs")
    verb.add_argument("--label", metavar="NAME", help="name of the model in results (default: its folder's name)")
    settings = verb.add_argument_group("settings", "The default is what the paper used for the task.")
    for flag, kind, text in SETTINGS:
        settings.add_argument(flag, type=kind, metavar="X" if kind is float else "N", help=text)
    settings.add_argument("--dtype", choices=["fp32", "bf16"], help="of the matrix products (default: fp32)")
    settings.add_argument(
        "--kernels",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="who computes attention, LayerNorm, GEGLU and dropout (default: Triton on a GPU where it works)",
    )


def _shared_options(args: argparse.Namespace) -> dict[str, Any]:
    settings = [flag[2:].replace("-", "_") for flag, _, _ in SETTINGS]
    options = {name: getattr(args, name) for name in ("like", "label", *settings, "dtype", "kernels")}
    return options | {"command": args.command_line}


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own without `argv`) and return the exit status."""
    return main(build_parser(argv), argv)


if __name__ == "__main__":
    sys.exit(run())
