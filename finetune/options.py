"""The flags that `run` and `gue` share: model, protocol, settings, columns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.cli import InputError
from finetune.data import Columns

# Flag, type, help; the default is the protocol's for the task.
NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("--learning-rate", float, "reached after the warm-up, then linear to 0"),
    ("--batch-size", int, "sequences a step"),
    ("--epochs", int, "the run ends after these or --max-steps, whichever comes first"),
    ("--max-steps", int, "most steps"),
    ("--warmup-steps", int, "steps over which the learning rate rises from 0"),
    ("--weight-decay", float, "of matrices (AdamW)"),
    ("--eval-every", int, "steps between evaluations on dev"),
    ("--patience", int, "stop after this many evaluations without a better one (default: never)"),
    ("--max-length", int, "truncate to this many tokens, [CLS] and [SEP] included (strict: nothing is truncated)"),
    ("--lora-rank", int, "of the low-rank updates"),
    ("--lora-alpha", float, "updates are scaled by this / rank"),
    ("--lora-dropout", float, "of what the updates see"),
)
CHOICES = (
    (
        "--method",
        ["full", "lora", "probe"],
        "all weights, low-rank updates, or a linear probe on embeddings (default: full)",
    ),
    (
        "--pooling",
        ["cls", "mean"],
        "the vector of a sequence: the first token's, or the mean of all (default: cls; probe: mean)",
    ),
    ("--best-by", ["loss", "score"], "which evaluation's weights are kept; score is MCC (strict: score, paper: loss)"),
    ("--dtype", ["fp32", "bf16"], "of the matrix products (default: fp32)"),
)


def add_shared(verb: argparse.ArgumentParser) -> None:
    """What one run and many take alike; `shared_options` hands it on."""
    verb.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a run directory of `pretrain train`, a Hugging Face directory, `random`: without pre-training, `kmer`: k-mer "
        "counts and logistic regression, or `cnn`: a small convolutional network",
    )
    verb.add_argument(
        "--like",
        metavar="MODEL",
        help="with --model random: give the random weights the architecture and tokenizer of MODEL "
        "(default: the tiny preset, and a tokenizer trained on the task)",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="RESULTS", help="folder for the results of all runs")
    verb.add_argument(
        "--label", metavar="NAME", help="name of the model in results (default: its folder's name, and the method)"
    )
    verb.add_argument(
        "--protocol",
        choices=["strict", "paper"],
        help="strict: nothing truncated, the model of the best dev score, three seeds or more; paper: as the published "
        "scripts, which truncate and take the lowest dev loss (default: strict, with any number of seeds)",
    )
    settings = verb.add_argument_group("settings", "The default is the protocol's for the task.")
    for flag, choices, text in CHOICES:
        settings.add_argument(flag, choices=choices, help=text)
    for flag, kind, text in NUMBERS:
        settings.add_argument(flag, type=kind, metavar="X" if kind is float else "N", help=text)
    settings.add_argument(
        "--clean",
        action="store_true",
        default=None,
        help="choose by dev rows that are not in train; test is scored with and without its leaked rows in any case",
    )
    settings.add_argument(
        "--kernels",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="who computes attention, LayerNorm, GEGLU and dropout (default: Triton on a GPU where it works)",
    )
    add_columns(verb)


def add_columns(verb: argparse.ArgumentParser) -> None:
    """What the columns of the CSV files mean; `columns` reads it."""
    group = verb.add_argument_group("columns of the CSV files")
    group.add_argument(
        "--sequence-columns", nargs="+", metavar="NAME", help="one, or two of pairs (default: found by their names)"
    )
    group.add_argument("--label-column", metavar="NAME", help="(default: label)")
    group.add_argument(
        "--kind",
        choices=["classification", "regression"],
        help="(default: regression where labels are numbers with a decimal point)",
    )


def columns(args: argparse.Namespace) -> Columns:
    """What `add_columns` was given."""
    names = args.sequence_columns
    if names is not None and len(names) > 2:
        raise InputError(f"--sequence-columns {' '.join(names)}: one, or two of pairs")
    return Columns(None if names is None else tuple(names), args.label_column, args.kind)


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `finetune.run.run` but for model, task, seed and protocol."""
    flags = [flag for flag, *_ in (*CHOICES, *NUMBERS)]
    names = ["like", "label", "clean", "kernels", *(flag[2:].replace("-", "_") for flag in flags)]
    return {name: getattr(args, name) for name in names} | {"columns": columns(args), "command": args.command_line}
