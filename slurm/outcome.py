"""How a life of a run ended, in the words that `pretrain.sbatch` acts on."""

from __future__ import annotations

import argparse
import json
import os
import signal
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_prep.cli import HUNG, RUN_AGAIN, log
from pretrain.lives import read_lives

NOTICES = {128 + signal.SIGUSR1, 128 + signal.SIGTERM}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--srun", type=int, required=True, metavar="STATUS", help="what srun ended with")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: prints status, lives without progress and bad nodes on one line, for `read`."""
    result = outcome(args.run_dir, args.srun)
    log(f"{args.run_dir}: {result['reason']}")
    if not args.json:
        print(result["status"], result["lives_without_progress"], ",".join(result["bad_nodes"]), flush=True)
    return result


def outcome(run_dir: Path, srun_status: int) -> dict[str, Any]:
    """`status` (one of the project's exit statuses), `reason`, `lives_without_progress` and `bad_nodes`.

    exit.json counts, of this life: the job script has removed that of the life before. srun's status is for lives that ended
    without one, and is not to be trusted when it is 0: srun says so too where it gave up on a node, or was told to end.
    `bad_nodes` are those that preflight found, in this life.
    """
    written, preflight = _read(run_dir / "exit.json"), _read(run_dir / "preflight.json")
    if "status" in written:
        status, reason = int(written["status"]), str(written.get("reason"))
    elif srun_status in NOTICES:
        status, reason = RUN_AGAIN, "told to stop before training had begun"
    elif srun_status in (0, 128 + signal.SIGKILL):  # killed: by a dead node, the memory limit, or srun's --wait
        status, reason = HUNG, f"ranks were lost, and none wrote exit.json (srun: {srun_status})"
    else:
        status, reason = srun_status, f"ended before training had begun; see the log (srun: {srun_status})"
    return {
        "status": status,
        "reason": reason,
        "lives_without_progress": without_progress(run_dir) + _starts_without_a_life(run_dir),
        "bad_nodes": list(preflight.get("bad_nodes", [])),
    }


def without_progress(run_dir: Path) -> int:
    """How many of the last lives, one after the other, began at the step that is still the newest."""
    steps = [path.parent.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*/MANIFEST.json")]
    newest = max((int(step) for step in steps if step.isdigit()), default=0)
    return len(list(takewhile(lambda life: life["from_step"] == newest, reversed(read_lives(run_dir)))))


def _starts_without_a_life(run_dir: Path) -> int:
    """How often this job was started since the last life that began to train: not even that came of them."""
    starts, lives = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1, read_lives(run_dir)
    ours = lives and lives[-1]["job"] == os.environ.get("SLURM_JOB_ID")
    return starts - ((lives[-1]["restart"] or 0) + 1 if ours else 0)


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty where there is none, or one that a dying node has left unfinished."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
