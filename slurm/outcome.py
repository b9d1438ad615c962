"""How a start of a run's job ended, in the words that `pretrain.sbatch` acts on."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import Any

from data_prep.cli import DONE, HUNG, RUN_AGAIN, log

NOTICES = {128 + signal.SIGUSR1, 128 + signal.SIGTERM}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--srun", type=int, required=True, metavar="STATUS", help="what srun ended with")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: prints status, newest checkpoint and bad nodes on one line, for `read`."""
    result = outcome(args.run_dir, args.srun)
    log(f"{args.run_dir}: {result['reason']}")
    if not args.json:
        print(result["status"], result["checkpoint_step"], ",".join(result["bad_nodes"]), flush=True)
    return result


def outcome(run_dir: Path, srun_status: int) -> dict[str, Any]:
    """`status` (one of the project's exit statuses), `reason`, `checkpoint_step` (0: none) and `bad_nodes`.

    exit.json counts, then preflight.json, both of this start: the job script has removed those of the start before. srun's
    status is for starts that ended without either, and is not to be trusted when it is 0: srun says so too where it gave up
    on a node, or was told to end. `bad_nodes` are those that preflight found.
    """
    written, preflight = _read(run_dir / "exit.json"), _read(run_dir / "preflight.json")
    if isinstance(written.get("status"), int):
        status, reason = written["status"], str(written.get("reason"))
    elif isinstance(preflight.get("status"), int) and preflight["status"] != DONE:
        # Not srun's: that of a rank that could not even start is higher.
        status, reason = preflight["status"], "the checks failed; see above"
    elif srun_status in NOTICES:
        status, reason = RUN_AGAIN, "told to stop before training had begun"
    elif srun_status in (0, 128 + signal.SIGKILL):  # killed: by a dead node, the memory limit, or srun's --wait
        status, reason = HUNG, f"ranks were lost, and none wrote exit.json (srun: {srun_status})"
    else:
        status, reason = srun_status, f"ended before training had begun; see the log (srun: {srun_status})"
    return {
        "status": status,
        "reason": reason,
        "checkpoint_step": newest_checkpoint(run_dir),
        "bad_nodes": list(preflight.get("bad_nodes") or []),
    }


def newest_checkpoint(run_dir: Path) -> int:
    """The newest committed step; 0 where there is none."""
    steps = [path.parent.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*/MANIFEST.json")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty where there is none, or one that a dying node has left unfinished."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
