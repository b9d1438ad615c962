"""`python -m pretrain <verb>`: train, plan, export, import, inspect, plot and benches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, IntermixedParser, add_verb, leave, main


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.config import load_config
    from pretrain.distributed import environment_rank
    from pretrain.train import train

    if args.profile < 0:
        raise InputError(f"--profile {args.profile}: must be a number of steps")
    args.json = args.json and environment_rank() == 0  # one result, however many ranks
    return train(load_config(args.config, args.overrides), args.from_step, args.profile)


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.hf import export_run

    return export_run(args.run_dir, args.out, args.step)


def _import(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.hf import import_directory

    return import_directory(args.directory, args.out, args.like, args.step, args.fresh_optimizer)


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.inspect_run import run

    return run(args)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.plan import run

    return run(args)


def _plot(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.plot import run

    return run(args)


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.bench import run

    return run(args)


def _bench_loader(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.bench_loader import run

    return run(args)


def _bench_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.bench_checkpoint import run
    from pretrain.distributed import environment_rank

    args.json = args.json and environment_rank() == 0
    return run(args)


def _bench_order(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.bench_order import run

    return run(args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pretrain", description="Masked-language-model pre-training.")
    # The `deepspeed` launcher adds it; the environment, which all launchers set, says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=IntermixedParser)

    train = add_verb(
        verbs,
        "train",
        _train,
        "Train, or go on with the run in run_dir. Started alone, by torchrun, by deepspeed or by srun. "
        "Exit status: 0 done, 2 bad input, 70 hung or lost a rank (run again), 75 stopped on request (run again), 1 failed; "
        "also in RUN_DIR/exit.json.",
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset such as tiny")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    train.add_argument(
        "--from-step",
        type=int,
        metavar="N",
        help="go back to checkpoint N, once: later ones are set aside; keys of optimizer and bad_steps may change",
    )

    train.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="write a trace of so many steps, after two to warm up, and the share of communication to RUN_DIR/profile",
    )

    plan = add_verb(
        verbs,
        "plan",
        _plan,
        "What a run needs, before it starts: memory a GPU, tokens, hours, disk. Exit status 2 where it can't fit, with what "
        "would. Needs neither GPU nor dataset.",
    )
    from pretrain.plan import add_arguments as add_plan_arguments

    add_plan_arguments(plan)

    export = add_verb(verbs, "export", _export, "Write a run's weights as a self-contained Hugging Face directory.")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("--out", type=Path, required=True, metavar="HF_DIR")
    export.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest that verifies)")

    import_ = add_verb(
        verbs,
        "import",
        _import,
        "Make a run directory from Hugging Face files, from what DeepSpeed's save_checkpoint wrote, or from another run's "
        "checkpoint, for a next phase on other data. `train` starts at step 0 from the weights, and from Adam's moments but "
        "for Hugging Face files, which have none.",
    )
    import_.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="an export, the published DNABERT-2-117M, a DeepSpeed checkpoint or a run",
    )
    import_.add_argument("--out", type=Path, required=True, metavar="RUN_DIR")
    import_.add_argument(
        "--like",
        type=Path,
        metavar="HF_DIR|RUN_DIR",
        help="model with the architecture and tokenizer of a DeepSpeed checkpoint (default: config.json and tokenizer.json "
        "in DIR or beside it)",
    )
    import_.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint of a run (default: the newest that verifies)"
    )
    import_.add_argument("--fresh-optimizer", action="store_true", help="leave Adam's moments behind")

    inspect = add_verb(verbs, "inspect", _inspect, "List a run's checkpoints and check every byte of them; changes nothing.")
    from pretrain.inspect_run import add_arguments as add_inspect_arguments

    add_inspect_arguments(inspect)

    plot = add_verb(verbs, "plot", _plot, "Draw the curves of one or several runs as one PNG.")
    from pretrain.plot import add_arguments as add_plot_arguments

    add_plot_arguments(plot)

    bench = add_verb(verbs, "bench", _bench, "Training speed beside Hugging Face's BERT, in one run.")
    from pretrain.bench import add_arguments

    add_arguments(bench)

    loader = add_verb(verbs, "bench-loader", _bench_loader, "Loader speed beside webdataset and others, on one core.")
    from pretrain.bench_loader import add_arguments as add_loader_arguments

    add_loader_arguments(loader)

    checkpoint = add_verb(
        verbs, "bench-checkpoint", _bench_checkpoint, "For how long a save stops training, ours and DeepSpeed's, in one run."
    )
    from pretrain.bench_checkpoint import add_arguments as add_checkpoint_arguments

    add_checkpoint_arguments(checkpoint)

    order = add_verb(verbs, "bench-order", _bench_order, "How well training shuffles, and what its order costs at scale.")
    from pretrain.bench_order import add_arguments as add_order_arguments

    add_order_arguments(order)
    return parser


if __name__ == "__main__":
    leave(main(build_parser()))
