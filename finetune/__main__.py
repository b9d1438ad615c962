"""`python -m finetune <verb>`: what a pre-trained model is worth on the Genome Understanding Evaluation (GUE), and what it
says of sequences: embeddings, attention maps, predictions, variants."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.cli import add_verb, main, stoppable
from finetune.options import add_shared, shared_options

# Verb -> module with add_arguments and run, help. Imported when it is asked for: each needs other libraries.
MODULES: dict[str, tuple[str, str]] = {
    "report": (
        "finetune.report.command",
        "Make tables and a picture of the runs in a results folder: means over seeds, intervals, tests, published scores.",
    ),
    "audit": (
        "finetune.audit",
        "Look at the data before a score is made of it: rows in two splits, contradictory labels, letters, truncation.",
    ),
    "predict": ("finetune.predict", "Predict the classes (or numbers) of new sequences with a fine-tuned model."),
    "embed": ("finetune.embed", "Write one vector a sequence of a FASTA or CSV file."),
    "attention": ("finetune.attention", "Write and draw the attention maps of one sequence."),
    "variants": (
        "finetune.variants",
        "Score variants of a VCF file by masked likelihood and by the distance of embeddings.",
    ),
    "bench": (
        "finetune.bench",
        "Compare the speed of fine-tuning and evaluation with the published way: Hugging Face's Trainer, padded batches.",
    ),
}


def run_run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune once."""
    from finetune.run import run as run_once

    options = shared_options(args) | {"seed": args.seed, "protocol": args.protocol or "strict", "export": args.export}
    with stoppable():
        return run_once(args.model, args.task, args.out, **options)


def run_gue(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune on all tasks with several seeds."""
    from finetune.suite import gue

    return gue(
        args.model,
        args.data,
        args.out,
        seeds=args.seeds,
        num_tasks=args.num_tasks,
        task=args.task,
        processes=args.processes,
        protocol=args.protocol,
        names=args.tasks,
        baselines=args.baselines,
        **shared_options(args),
    )


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The command line; `argv` is what results files say of it."""
    parser = argparse.ArgumentParser(prog="python -m finetune", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    command_line = shlex.join(["python", "-m", "finetune", *(sys.argv[1:] if argv is None else argv)])

    verb = add_verb(
        verbs,
        "run",
        run_run,
        "Fine-tune one model on one task with one seed, or fit a baseline: the best by dev, scored once on test. "
        "A run that is done already is not done again.",
    )
    verb.set_defaults(command_line=command_line)
    verb.add_argument(
        "--task",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of train.csv, dev.csv, test.csv, such as GUE/tf/0; or one CSV file, off which dev and test are split",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="order, dropout, fresh weights (default: 0)")
    verb.add_argument(
        "--export",
        type=Path,
        metavar="HF_DIR",
        help="write the fine-tuned model there, for `predict` and for AutoModelForSequenceClassification",
    )
    add_shared(verb)

    verb = add_verb(
        verbs,
        "gue",
        run_gue,
        "Fine-tune a model, and baselines, on all tasks below a folder with several seeds. Runs that are done already are "
        "not done again; one that fails doesn't keep the others from being done.",
    )
    verb.set_defaults(command_line=command_line)
    verb.add_argument(
        "--data", type=Path, required=True, metavar="GUE_DIR", help="folder with folders of the three CSV files"
    )
    verb.add_argument("--seeds", type=int, default=3, metavar="S", help="runs a task, with seeds 0 to S - 1 (default: 3)")
    verb.add_argument("--tasks", nargs="+", metavar="TASK", help="only these, such as tf/0 mouse/1 (default: all)")
    verb.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="beside the model: random (its architecture and tokenizer without pre-training), kmer, cnn, other checkpoints",
    )
    verb.add_argument("--num-tasks", type=int, metavar="N", help="elements of a job array that share the runs")
    verb.add_argument("--task", type=int, metavar="I", help="number of this element, from 0")
    verb.add_argument(
        "--processes", type=int, metavar="P", help="without GPU: runs at a time (default: 1); with GPUs it is one a GPU"
    )
    add_shared(verb)

    for name, (module, text) in MODULES.items():
        verb = add_verb(verbs, name, _of(module), text)
        if name in (sys.argv[1:] if argv is None else argv):
            importlib.import_module(module).add_arguments(verb)
    return parser


def _of(module: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    def run(args: argparse.Namespace) -> dict[str, Any]:
        result: dict[str, Any] = importlib.import_module(module).run(args)
        return result

    return run


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own without `argv`) and return the exit status."""
    return main(build_parser(argv), argv)


if __name__ == "__main__":
    sys.exit(run())
