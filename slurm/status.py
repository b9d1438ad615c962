"""`python -m slurm status`: where a run stands, from its run directory and from Slurm. Changes nothing, imports no torch.

Ages ("ago") are those of files by this machine's clock; the clocks of hosts and file servers differ by some seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from data_prep.cli import BAD_INPUT, DONE, HUNG, RUN_AGAIN, InputError, log
from pretrain.lease import holder
from pretrain.lives import read_lives
from slurm.jobs import find_job, has_ended, owner_lives
from slurm.preflight.check import MISS

TAIL_BYTES = 1 << 16  # of metrics.jsonl, which can be huge: some hundred records
RECENT = 20  # records, for medians
SILENT_INTERVALS, SILENT_SECONDS = 5.0, 120.0  # without a metric line, from where it is remarkable: both have to pass
SPEED = {"tokens_per_second": "tokens_per_second", "mfu": "mfu", "seconds_per_step": "step_seconds_p50"}
STUCK_LIVES = 3  # in a row without a new checkpoint, this one included, from where the last line says so
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
AT_WORK = {"running", "silent"}
FILES = {"config.yaml", "lives.jsonl", "lease.json", "exit.json", "preflight.json", "checkpoints"}
TOKEN = ".preflight-*"  # what the checks before training put into a run directory, and soon remove
CHECKS_SECONDS = 900.0  # more than they take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: look and log."""
    found = status(args.run_dir)
    for name, text in _lines(found).items():
        log(f"{name:<11}{text}")
    log(found["advice"])
    return found


def status(run_dir: Path) -> dict[str, Any]:
    """What is known about a run; None for what is not. Ages, and times to come, in seconds.

    `step`, `last_step` (where the run ends), `loss`, `tokens_per_second`, `mfu`, `seconds_per_step` (medians of the last
    records), `metrics_age`, `silent`; `checkpoint` {`step`, `age`}; `job` (see `find_job`); `lease` with `alive`; `lives`,
    `life` (the last one) and `lives_without_progress`; `exit` (exit.json); `preflight` {`status`,
    `job`, `time`, `bad_nodes`, `missed`: rows}, if no life has begun since; `checking`, the age of checks that may be at
    work; `seconds_left` of training and `more_lives` after this one; `state`, a word, and `advice`, a line.

    Raises InputError where there is no run directory.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such directory; a run makes it when its job starts (squeue --me lists what waits)")
    names = {path.name for path in run_dir.iterdir()}
    checking = _age_of_token(run_dir)
    if not (names & FILES or checking is not None or all(name.startswith(".") for name in names)):
        raise InputError(f"{run_dir}: not a run directory: it has none of {', '.join(sorted(FILES))}")
    lives, lease = read_lives(run_dir), holder(run_dir)
    life = lives[-1] if lives else None
    preflight = _preflight(run_dir / "preflight.json", life)
    sources = [preflight, lease, life]  # of the job, newest first, but nothing is newer than an owner that lives
    if lease is not None:
        lease["alive"] = owner_lives(run_dir, lease)
        if lease["alive"] is not False:
            sources = [lease, preflight, life]
    saved = _newest_checkpoint(run_dir / "checkpoints")
    job_id = next((one["job"] for one in sources if one is not None and isinstance(one.get("job"), str)), None)
    found: dict[str, Any] = {
        "run_dir": str(run_dir),
        "last_step": _last_step(run_dir / "config.yaml"),
        **_metrics(run_dir / "metrics.jsonl"),
        "checkpoint": saved,
        "job": None if job_id is None else find_job(job_id),
        "lease": lease,
        "lives": len(lives),
        "life": life,
        "lives_without_progress": _without_progress(lives, saved["step"] if saved else 0),
        "exit": _exit(run_dir / "exit.json"),
        "preflight": preflight,
        "checking": checking if checking is not None and checking < CHECKS_SECONDS else None,
    }
    found["state"], found["advice"] = _judge(found)
    found["silent"] = found["state"] == "silent"
    return found | _to_come(found)


def _last_step(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        train = yaml.safe_load(path.read_bytes())["train"]
        return int(min(step for step in (train["max_steps"], train.get("stop_at_step")) if step is not None))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not the configuration of a run: {' '.join(str(error).split())}") from None


def _metrics(path: Path) -> dict[str, Any]:
    """The last record's step and loss, medians of the last ones, and whether a line has been due for long."""
    records, age = _tail(path)
    recent = records[-RECENT:]
    found: dict[str, Any] = {"step": recent[-1]["step"] if recent else None, "metrics_age": age}
    found["loss"] = recent[-1].get("loss") if recent else None
    for name, key in SPEED.items():
        values = [record[key] for record in recent if record.get(key) is not None]
        found[name] = statistics.median(values) if values else None
    usual = 0.0
    if len(recent) > 1 and found["seconds_per_step"]:
        usual = (recent[-1]["step"] - recent[-2]["step"]) * found["seconds_per_step"]
    found["silent"] = age is not None and age > max(SILENT_INTERVALS * usual, SILENT_SECONDS)
    return found


def _tail(path: Path) -> tuple[list[dict[str, Any]], float | None]:
    """The last records of a metrics.jsonl, without what is torn or has no numbers, and the age of the file."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = stream.seek(max(0, size - TAIL_BYTES))
            lines = stream.read().split(b"\n")[1 if start else 0 : -1]
            age = max(0.0, time.time() - os.fstat(stream.fileno()).st_mtime)
    except FileNotFoundError:
        return [], None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
            values = [record.get(key) for key in ("loss", *SPEED.values())]
        except (ValueError, AttributeError):
            continue
        if isinstance(record.get("step"), int) and all(isinstance(value, int | float | None) for value in values):
            records.append(record)
    return records, age


def _without_progress(lives: list[dict[str, Any]], newest: int) -> int:
    """How many of the last lives, one after the other, began at the step that is still the newest."""
    return len(list(takewhile(lambda life: life["from_step"] == newest, reversed(lives))))


def _newest_checkpoint(directory: Path) -> dict[str, Any] | None:
    for path in sorted(directory.glob("step-*"), reverse=True):
        number = path.name.removeprefix("step-")
        try:
            if number.isdigit():
                return {"step": int(number), "age": max(0.0, time.time() - (path / "MANIFEST.json").stat().st_mtime)}
        except (FileNotFoundError, NotADirectoryError):
            continue  # damaged, or removed meanwhile
    return None


def _age_of_token(run_dir: Path) -> float | None:
    try:
        ages = [time.time() - path.stat().st_mtime for path in run_dir.glob(TOKEN)]
    except FileNotFoundError:
        return None  # removed at this moment
    return max(0.0, min(ages)) if ages else None


def _exit(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        return record if isinstance(record["status"], int) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _preflight(path: Path, life: dict[str, Any] | None) -> dict[str, Any] | None:
    """The last checks; None where there were none, or a life has begun since: then they are of another start."""
    try:
        record = json.loads(path.read_bytes())
        if life is not None and str(life["time"] or "") > record["time"]:
            return None
        missed = [
            {key: str(row[key]) for key in ("group", "name", "found", "fix")}
            for row in record["checks"]
            if row["verdict"] == MISS
        ]
        nodes = [str(node) for node in record.get("bad_nodes") or []]
        return {key: record[key] for key in ("status", "job", "time")} | {"bad_nodes": nodes, "missed": missed}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _judge(found: dict[str, Any]) -> tuple[str, str]:
    """The state in a word, and what to do about it."""
    job, lease, life = found["job"], found["lease"], found["life"]
    alive = False if lease is None else lease["alive"]
    warning = ""
    if found["lives_without_progress"] >= STUCK_LIVES:
        warning = f"; the last {found['lives_without_progress']} lives began at step {life['from_step']}: read their output"
    if job is not None and job["state"] is not None and not has_ended(job):
        state, reason = job["state"], job.get("reason") or "to be looked at by Slurm"
        if state in WAITING:
            if reason == "DependencyNeverSatisfied":
                return "held", f"waits for a job that has failed: scancel {job['id']}, and submit again"
            if state not in ("PENDING", "REQUEUED", "REQUEUE_FED") or "held" in reason.lower():
                return "held", f"held in the queue ({reason}): scontrol release {job['id']}{warning}"
            return "waiting", f"waiting in the queue: {reason}{warning}"
        if state != "RUNNING":
            return state.lower(), f"job {job['id']} is {state}"
        if alive is False or life is None or life["life"] != lease.get("life"):
            return "starting", f"the job runs; its life has not begun to train yet, or is ending{warning}"
        alive = True
    if alive:
        if found["silent"]:
            since = _span(found["metrics_age"])
            return "silent", f"running, but silent for {since}; the watchdog ends a step that hangs (watchdog.step_seconds)"
        return "running", f"running{warning}"
    if alive is None:
        where = f"on host {lease.get('host')}, which can't be looked up from here"
        return "unknown", f"may be running {where}; submitting it again is safe: a second life waits and refuses"
    return _judge_end(found, warning)


def _judge_end(found: dict[str, Any], warning: str) -> tuple[str, str]:
    """Of a run that nobody runs now."""
    job, ended = found["job"], found["exit"]
    again = f"submit it again, unless a job of it is in the queue already (squeue --me){warning}"
    job_ended = job is not None and job["state"] is not None
    how = f" (job {job['id']}: {job['state']})" if job_ended else ""
    if ended is None:
        if found["checking"] is not None:
            return (
                "checking",
                f"its nodes are checked before it trains, for {_span(found['checking'])} now, or that was killed{how}",
            )
        if found["preflight"] is not None and found["preflight"]["missed"]:
            return "refused", _refusal(found["preflight"], again)
        if found["life"] is None and found["lease"] is None:
            return "new", f"no life has begun to train{how}; if its job has run, the job's output says why: {again}"
        return "dead", f"ended without a word, killed or with its node{how}: {again}"
    reason, number = ended.get("reason"), ended["status"]
    if number == DONE:
        return "finished", "finished"
    if number == RUN_AGAIN:
        return "stopped", f"stopped, status {number}: {reason}{how}: {again}"
    if number == HUNG:
        return "failed", f"hung or lost a rank, status {number}: {reason}{how}; stacks are in hangs/: {again}"
    if number == BAD_INPUT:
        return "failed", f"failed, status {number}: {reason}: mend that, and submit it again"
    output = f" (the job's output: {job['output']})" if job is not None and job.get("output") else ""
    return "failed", f"failed, status {number}: {reason}{how}: find the cause{output}, then {again}"


def _refusal(checks: dict[str, Any], again: str) -> str:
    """What was missing before training, first of all; a job comes back by itself where that was a node."""
    first, more = checks["missed"][0], len(checks["missed"]) - 1
    text = f"refused by the checks before training, status {checks['status']}: {first['group']}, {first['name']}: "
    text += f"{first['found']}; {first['fix']}" + (f" (and {more} more MISS in preflight.json)" if more else "")
    if checks["status"] != HUNG:
        return f"{text}: then submit it again"
    nodes = ",".join(checks["bad_nodes"])
    return f"{text}: its job comes back by itself{nodes and f', without {nodes}'}; else {again}"


def _to_come(found: dict[str, Any]) -> dict[str, Any]:
    """Training that is left at the recent speed, and in how many lives after this one, or the one that waits."""
    here = found["step"] if found["state"] in AT_WORK else (found["checkpoint"] or {"step": 0})["step"]
    left = None
    if found["last_step"] is not None and here is not None and found["seconds_per_step"] is not None:
        left = max(0, found["last_step"] - here) * found["seconds_per_step"]
    job, more = found["job"], None
    if left is not None and job is not None and job.get("time_limit_seconds") and not has_ended(job):
        more = max(0, math.ceil((left - job["time_left_seconds"]) / job["time_limit_seconds"]))
    return {"seconds_left": left, "more_lives": more}


def _lines(found: dict[str, Any]) -> dict[str, str]:
    """What is known, a line a subject, for people."""
    lines = {"run": found["run_dir"]}
    step, last = found["step"], found["last_step"]
    if step is not None:
        of = "" if not last else f" of {last} ({step / last:.1%})"
        loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
        lines["step"] = f"{step}{of}{loss}, written {_span(found['metrics_age'])} ago"
    elif last is not None:
        lines["step"] = f"none yet of {last}"
    speed = []
    if found["tokens_per_second"] is not None:
        speed.append(f"{found['tokens_per_second']:,.0f} tokens/s")
    if found["mfu"] is not None:
        speed.append(f"MFU {found['mfu']:.1%}")
    if found["seconds_per_step"] is not None:
        speed.append(f"{found['seconds_per_step']:.3g} s a step")
    if speed:
        lines["speed"] = ", ".join(speed)
    saved = found["checkpoint"]
    lines["checkpoint"] = f"step {saved['step']}, {_span(saved['age'])} ago" if saved else "none"
    if found["job"] is not None:
        lines["job"] = _job_line(found["job"], found["life"])
    life, lease = found["life"], found["lease"]
    if life is not None:
        where = life["nodes"] or life["host"]
        lines["lives"] = f"{found['lives']}; the last began {life['time']} at step {life['from_step']}, "
        lines["lives"] += f"{life['ranks']} ranks on {where}"
        if found["lives_without_progress"] > 1:
            lines["lives"] += f"; {found['lives_without_progress']} in a row began there"
    if lease is not None:
        alive = {True: "lives", False: "is dead", None: "can't be looked up from here"}[lease["alive"]]
        lines["lease"] = f"life {lease.get('life')}, pid {lease.get('pid')} on host {lease.get('host')}: {alive}"
    if found["seconds_left"]:
        lines["left"] = f"about {_span(found['seconds_left'])} of training"
        if found["state"] in AT_WORK and not found["more_lives"]:
            end = time.localtime(time.time() + found["seconds_left"])
            lines["left"] += time.strftime(", until %Y-%m-%d %H:%M here", end)
        if found["more_lives"]:
            this = "this one" if found["state"] in AT_WORK else "the one that waits"
            lives = "life" if found["more_lives"] == 1 else "lives"
            lines["left"] += f": {found['more_lives']} more {lives} after {this}, at the job's time limit"
    return lines


def _job_line(job: dict[str, Any], life: dict[str, Any] | None) -> str:
    if job["state"] is None:
        return f"{job['id']}: {job['problem']}"
    words = [f"{job['id']} {'is unknown to Slurm by now' if job['state'] == 'GONE' else job['state']}"]
    if not has_ended(job) and job.get("reason"):
        words[0] += f" ({job['reason']})"
    if job.get("nodes"):
        words[0] += f" on {job['nodes']}"
    restarts = job.get("restarts", (life or {}).get("restart"))
    words.append(f"{restarts or 'no'} restart{'' if restarts == 1 else 's'}")
    if job["state"] in WAITING:
        words += [f"starts {job['starts']} at the earliest"] if job.get("starts") else []
    elif not has_ended(job) and job.get("time_limit_seconds"):
        words.append(f"{_span(job['time_left_seconds'])} left of {_span(job['time_limit_seconds'])}")
    return ", ".join(words)


def _span(seconds: float) -> str:
    """In the two largest units that say something."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 2 else f"{days} d {hours % 24} h"
