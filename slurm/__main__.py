"""`python -m slurm <verb>`: what the job scripts of this folder, and the people who submit them, ask and do.

`status`, `clean` and `outcome` import no torch, so that they answer at once; `submit` does where there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from data_prep.cli import IntermixedParser, add_verb, leave, main


def _preflight(args: argparse.Namespace) -> dict[str, Any]:
    from pretrain.distributed import environment_rank
    from slurm.preflight.verb import run

    args.json = args.json and environment_rank() == 0  # one result, however many ranks
    result = run(args)
    if args.then_train:
        # The store of the checks may still be listening; torchrun's serves both.
        if "MASTER_PORT" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        options = [] if args.from_step is None else ["--from-step", str(args.from_step)]
        options += ["--profile", str(args.profile)] if args.profile else []
        options += ["--json"] if args.json else []
        # Not a child: signals must reach the training process.
        os.execv(sys.executable, [sys.executable, "-m", "pretrain", "train", args.config, *args.overrides, *options])
    return result


def _submit(args: argparse.Namespace) -> dict[str, Any]:
    from slurm.pipeline import run

    return run(args)


def _status(args: argparse.Namespace) -> dict[str, Any]:
    from slurm.status import run

    return run(args)


def _clean(args: argparse.Namespace) -> dict[str, Any]:
    from slurm.clean import run

    return run(args)


def _outcome(args: argparse.Namespace) -> dict[str, Any]:
    from slurm.outcome import run

    return run(args)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m slurm", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=IntermixedParser)

    preflight = add_verb(
        verbs,
        "preflight",
        _preflight,
        "Inside the allocation, before training and with its arguments: would this run on these nodes work? "
        "Exit status: 0 yes, 2 something has to be mended, 70 a node is missing or broken (see RUN_DIR/preflight.json).",
    )
    from slurm.preflight.verb import add_arguments as add_preflight_arguments

    add_preflight_arguments(preflight)
    preflight.add_argument("--then-train", action="store_true", help="become `pretrain train` when all is well")

    submit = add_verb(verbs, "submit", _submit, "Submit a pipeline as one chain of jobs; what is done is not done again.")
    from slurm.pipeline import add_arguments as add_submit_arguments

    add_submit_arguments(submit)

    status = add_verb(verbs, "status", _status, "Where a run stands: its job, step, speed, checkpoints and expected end.")
    from slurm.status import add_arguments as add_status_arguments

    add_status_arguments(status)

    clean = add_verb(verbs, "clean", _clean, "List what runs, datasets and caches have left behind; --yes removes it.")
    from slurm.clean import add_arguments as add_clean_arguments

    add_clean_arguments(clean)

    outcome = add_verb(
        verbs, "outcome", _outcome, "For job scripts: the status a start ended with, its checkpoint, and bad nodes."
    )
    from slurm.outcome import add_arguments as add_outcome_arguments

    add_outcome_arguments(outcome)
    return parser


if __name__ == "__main__":
    leave(main(build_parser()))
