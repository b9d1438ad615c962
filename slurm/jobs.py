"""What Slurm says about jobs, for `status` and `clean`. Everything works without Slurm too, and then says less."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from data_prep.cli import InputError
from pretrain.lease import is_alive

SECONDS = 20  # that a command may take: one that finds no controller tries for minutes
# What a job that has left the queue is called; in all other states it has, or will have, processes somewhere.
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
GONE = "GONE"  # our word for a job that Slurm has forgotten
QUIET_SECONDS = 600.0  # without a beat, after which the owner of a lease whose job has ended is taken to be dead


def find_job(job_id: str) -> dict[str, Any]:
    """A job as scontrol knows it, or sacct when it has left scontrol's memory.

    `id`, `state` (GONE when neither knows it, None when nobody could be asked), and where known `reason`, `nodes`,
    `restarts`, `output` (a path), `time_limit_seconds` (None: unlimited), `time_left_seconds`, `starts` (Slurm's
    guess, local time). `problem` says why nobody could be asked.
    """
    shown, problem = _ask("scontrol", "show", "job", job_id)
    if shown is not None:
        return {"id": job_id} | _parse(shown)
    if problem and "nvalid job id" not in problem:
        return {"id": job_id, "state": None, "problem": problem}
    columns = "State,NodeList"
    kept, _ = _ask("sacct", "--allocations", "--noheader", "--parsable2", f"--format={columns}", f"--jobs={job_id}")
    if kept and kept.strip():
        state, nodes = kept.strip().splitlines()[-1].split("|")[:2]
        return {"id": job_id, "state": state.split()[0], "nodes": nodes}  # "CANCELLED by 1000"
    return {"id": job_id, "state": GONE}


def known_jobs() -> set[str]:
    """The ids of all jobs that Slurm still knows, waiting, running or just ended.

    Raises InputError when it can't be asked.
    """
    listed, problem = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%A")
    if listed is None:
        raise InputError(f"{problem}; run this on a node of the cluster")
    return set(listed.split())


def has_ended(job: dict[str, Any]) -> bool:
    """Whether the job is over for good: a job that waits to be started again is not."""
    return job["state"] in ENDED or job["state"] == GONE


def owner_lives(run_dir: Path, lease: dict[str, Any]) -> bool | None:
    """Whether the owner of RUN_DIR/lease.json lives; None when that can't be known from here.

    Looked up among the processes of this machine. One that lives and has written another file, of which this is a copy, does
    not count. An owner on another machine is known to be dead when its job has ended and the file has not been written for
    ten minutes. That the file was written lately proves nothing: clocks differ.
    """
    alive, job = is_alive(lease), lease.get("job")
    try:
        file = (run_dir / "lease.json").stat()
    except FileNotFoundError:
        return alive  # released at this moment
    if alive:
        return lease.get("inode") == file.st_ino
    if alive is not None or not isinstance(job, str):
        return alive
    quiet = time.time() - file.st_mtime > QUIET_SECONDS
    return False if quiet and has_ended(find_job(job)) else None


def _ask(*command: str) -> tuple[str | None, str | None]:
    """What a Slurm command printed, or None and why it printed nothing."""
    if shutil.which(command[0]) is None:
        return None, f"no Slurm here ({command[0]} is not installed)"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} does not answer"
    if done.returncode != 0:
        return None, " ".join(done.stderr.split()) or f"{command[0]} failed with status {done.returncode}"
    return done.stdout, None


def _parse(shown: str) -> dict[str, Any]:
    """Of `scontrol show job`. The first line, with a name that anybody may choose, is left out."""
    words: dict[str, str] = {}
    for line in shown.splitlines()[1:]:
        key, _, value = line.strip().partition("=")
        if key in ("Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment"):
            words.setdefault(key, value)  # to the end of the line: paths may hold spaces
        else:
            for word in line.split():
                key, _, value = word.partition("=")
                words.setdefault(key, value)
        if not line.strip() and words:
            break  # further records: other tasks of an array
    limit = _seconds(words["TimeLimit"])
    return {
        "state": words["JobState"],
        "reason": None if words["Reason"] == "None" else words["Reason"],
        "nodes": words.get("NodeList") if words.get("NodeList") not in ("", "(null)") else None,
        "restarts": int(words["Restarts"]),
        "output": words.get("StdOut") or None,
        "time_limit_seconds": limit,
        "time_left_seconds": None if limit is None else max(0, limit - (_seconds(words["RunTime"]) or 0)),
        "starts": words["StartTime"] if words.get("StartTime") != "Unknown" else None,
    }


def _seconds(text: str) -> int | None:
    """Of Slurm's [DAYS-]HH:MM:SS; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
