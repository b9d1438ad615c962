"""`python -m slurm submit`: a whole pipeline, from genomes to the GUE report, as one chain of dependent jobs.

A YAML file (pipeline_file.py) says what; everything is written below its `out`:

    OUT/tokenizer.json, dataset/, run/, hf/, results/, report/     what the stages make
    OUT/logs/                                                      the jobs' outputs
    OUT/pipeline.json                                              each stage's last job, its command and its options

Submitting again is safe: a stage whose product is there is left out, one whose job is still in the queue is waited for. A
job's comment is OUT: so one is found again of which Slurm didn't tell, or of which nothing could be recorded any more.
Values of the file reach the jobs as arguments and environment, never through a shell. This needs no torch; where there is
one, the run's configuration is checked before anything is submitted.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.cli import InputError, dump_json, log, write_atomically
from finetune.folders import check_splits, find_tasks
from finetune.suite import results_files
from pretrain.presets import read_config
from slurm.pipeline_file import Finetune, Pipeline, Pretrain, flatten, read_pipeline

ROOT = Path(__file__).resolve().parents[1]
STOP = "train.stop_at_step"  # where it grows, a finished run is not finished any more


@dataclass(frozen=True)
class Stage:
    """One job or job array."""

    name: str
    script: str
    arguments: list[str]
    product: Path
    made: bool  # the product is there, whole
    options: dict[str, str] = field(default_factory=dict)  # what the product depends on
    may_change: tuple[str, ...] = ()  # beginnings of those that a product may have been made with otherwise
    begun: bool = False  # a part of the product is there, which is known to need the same options
    stale: tuple[Path, ...] = ()  # what would stand in the way, or seem to be made, once the stage is done again
    environment: dict[str, str] = field(default_factory=dict)
    array: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE.yaml", help="see slurm/pipeline.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and submit nothing")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: submit, and say where to look."""
    result = submit(args.pipeline, args.dry_run)
    jobs = [job for job in result["jobs"].values() if job is not None]
    if not jobs:
        log(f"all is done; see {result['out']}")
    elif not args.dry_run:
        status = shlex.join(["python", "-m", "slurm", "status", str(Path(result["out"], "run"))])
        log(f"to look at it: squeue --jobs={','.join(jobs)}   {status}")
    return result


def submit(file: Path, dry_run: bool = False) -> dict[str, Any]:
    """Submit the stages that are neither done nor queued.

    Returns `out`; `jobs`, the id of each stage's job, or None where it needs none; the names of the stages that were `done`
    and `queued` already and those `submitted`, or that would be. Raises InputError for input that is wrong or missing, and
    where a stage was made with other options than the file's; RuntimeError when Slurm fails: what was submitted until then
    stays, and is recorded.
    """
    pipeline = read_pipeline(file)
    folder = Path(os.path.abspath(file.parent))
    out = _absolute(folder, pipeline.out)
    result: dict[str, Any] = {"out": str(out), "jobs": {}, "done": [], "queued": [], "submitted": []}
    stages = plan(pipeline, folder, out)  # first: it refuses what is wrong
    with _alone(out, dry_run):
        record = _read_record(out / "pipeline.json")
        queue = _queue(out, record)
        states = _states(stages, queue)
        for stage in stages:
            _compare(stage, record.get(stage.name), states[stage.name], queue.get(stage.name))
        log(f"{'stage':<10} {'job':>12} {'after':>12}  state")
        after = None
        for stage in stages:
            state, job = states[stage.name], None
            if state == "queued":
                job = queue[stage.name]
            elif state == "submitted":
                command = _command(stage, out, pipeline.sbatch.arguments(stage.name), after)
                if dry_run:
                    job = f"<{stage.name}>"
                    variables = [f"{name}={value}" for name, value in stage.environment.items()]
                    print(shlex.join([*(["env", *variables] if variables else []), *command]), flush=True)
                else:
                    record[stage.name] = {"job": None, "command": command, "options": stage.options}
                    _write_record(out, record)  # first: a job that nobody told us of may be in the queue all the same
                    job = _submit(stage, command, out)
            if not dry_run and job is not None and job != record[stage.name]["job"]:
                _set_aside(stage.stale)  # now that the job is accepted
                record[stage.name]["job"] = job
                _write_record(out, record)
            shown = "to submit" if dry_run and state == "submitted" else state
            log(f"{stage.name:<10} {job or '-':>12} {(job and after) or '-':>12}  {shown}")
            result["jobs"][stage.name] = after = job
            result[state].append(stage.name)
    return result


def plan(pipeline: Pipeline, folder: Path, out: Path) -> list[Stage]:
    """All stages in their order; InputError where an input is missing."""
    stages: list[Stage] = []
    given: dict[str, str] = {}
    if pipeline.dataset is None:
        dataset = out / "dataset"
        stages += _data_preparation(pipeline, folder, out, dataset)
    else:
        dataset = _absolute(folder, pipeline.dataset)
        manifest = dataset / "manifest.json"
        if not manifest.is_file():
            raise InputError(f"{dataset}: not a finished dataset, it has no manifest.json")
        given = {"dataset manifest sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    stages.append(_pretraining(pipeline.pretrain, folder, out, dataset, given))
    if pipeline.gue is not None:
        stages += _fine_tuning(pipeline.finetune, _absolute(folder, pipeline.gue), out, stages[-1].made)
    return stages


def _data_preparation(pipeline: Pipeline, folder: Path, out: Path, dataset: Path) -> Iterator[Stage]:
    genomes = _absolute(folder, pipeline.genomes or "")
    if not genomes.is_dir():
        raise InputError(f"{genomes}: no such folder; genomes is a folder of FASTA files")
    whole, source = (dataset / "manifest.json").is_file(), {"genomes": str(genomes)}
    sharding = source | pipeline.shard.options()
    if pipeline.tokenizer.file is None:
        tokenizer, options = out / "tokenizer.json", source | pipeline.tokenizer.options()
        arguments = ["tokenizer", f"--out={tokenizer}", *_flags(options)]
        yield Stage("tokenizer", "data_prep", arguments, tokenizer, tokenizer.is_file(), options)
        arguments = [f"--tokenizer={tokenizer}"]
    else:
        tokenizer, arguments = _absolute(folder, pipeline.tokenizer.file), []
        if not tokenizer.is_file():
            raise InputError(f"{tokenizer}: no such file; tokenizer is a finished tokenizer.json, or options to train one")
        sharding["tokenizer"] = str(tokenizer)
    arguments = ["shard", f"--out={dataset}", *arguments, *_flags(sharding)]
    yield Stage("shard", "data_prep", arguments, dataset, whole, sharding, ("processes",), array=pipeline.shard.array)
    excluded = {}
    if pipeline.shard.exclude is not None:
        listed = _absolute(folder, pipeline.shard.exclude)
        if not listed.is_file():
            raise InputError(f"{listed}: no such file; shard.exclude is a list of `python -m data_prep audit --exclusions`")
        excluded["exclude"] = str(listed)
    yield Stage("finalize", "data_prep", ["finalize", str(dataset), *_flags(excluded)], dataset, whole, excluded)


def _pretraining(section: Pretrain, folder: Path, out: Path, dataset: Path, given: dict[str, str]) -> Stage:
    run_dir, model = out / "run", out / "hf"
    file = _absolute(folder, section.config)
    config = str(file) if file.is_file() else section.config
    overrides = flatten(section.overrides)
    for key in {"run_dir", "data.path"} & overrides.keys():
        raise InputError(f"pretrain.overrides: {key} follows from out and dataset; leave it out")
    words = [f"{key}={value}" for key, value in overrides.items()]
    may_change, begun = [STOP], False
    try:
        from pretrain.config import MAY_CHANGE, NEW_EPOCH_MAY_CHANGE, load_config

        loaded = load_config(
            config, [*words, f"run_dir={json.dumps(str(run_dir))}", f"data.path={json.dumps(str(dataset))}"]
        )
        may_change += [*MAY_CHANGE, *((*NEW_EPOCH_MAY_CHANGE, *given) if loaded.data.start_new_epoch else ())]
        begun = (run_dir / "config.yaml").is_file()
    except ModuleNotFoundError as error:
        log(f"pretrain: there is no {error.name} here, so its configuration is not checked before its job starts")
    # What the file holds, not its name: it may be edited.
    options = flatten(read_config(config)[1]) | overrides | given
    options = {key: value for key, value in options.items() if key not in ("run_dir", "data.path")}
    finished = _finished(run_dir, json.loads(options.get(STOP, "null")))
    # Newer than the last checkpoint: it may be that of the run as it was before it was made longer.
    trained = [path.stat().st_mtime for path in run_dir.glob("checkpoints/step-*/MANIFEST.json")]
    exported = (model / "config.json").is_file()
    made = finished and exported and (model / "config.json").stat().st_mtime >= max(trained, default=0)
    # What has come of a finished run, of which only the export is missing, still counts.
    stale = () if finished and not exported else (model, out / "results", out / "report")
    environment = {"RUN_DIR": str(run_dir), "DATASET": str(dataset), "EXPORT": str(model)}
    arguments = [config, *words]
    return Stage(
        "pretrain", "pretrain", arguments, run_dir, made, options, tuple(may_change), begun, stale, environment=environment
    )


def _fine_tuning(section: Finetune, data: Path, out: Path, trained: bool) -> Iterator[Stage]:
    model, results, table = out / "hf", out / "results", out / "report" / "table.md"
    options = {"data": str(data)} | section.options()
    tasks = find_tasks(data, section.tasks)
    for name, path in tasks.items():
        try:
            check_splits(path)  # now, not days later
        except InputError as error:
            others = ", ".join(other for other in tasks if other != name)
            raise InputError(f"finetune: {error}; or leave it out with finetune.tasks: [{others}]") from None
    section.check(tasks)
    files = results_files(str(model), data, results, **section.planned())
    # Results of a model that is to be trained further are not its results; the runs themselves look at its weights.
    made = trained and all(file.is_file() for file in files)
    arguments = ["gue", f"--model={model}", f"--out={results}", *_flags(options)]
    arguments += section.words()
    recorded = options | section.recorded()
    yield Stage("finetune", "finetune", arguments, results, made, recorded, ("seeds", "processes"), array=section.array)
    made = made and table.is_file() and table.stat().st_mtime >= max(file.stat().st_mtime for file in files)
    yield Stage("report", "finetune", ["report", str(results), f"--out={table.parent}"], table, made)


def _finished(run_dir: Path, stop: int | None) -> bool:
    """Whether the run has come to its last step: `max_steps`, or where it is to stop before. InputError if it is beyond."""
    try:
        end = json.loads((run_dir / "exit.json").read_bytes())
        steps = yaml.safe_load((run_dir / "config.yaml").read_bytes())["train"]["max_steps"]
        last = steps if stop is None else min(steps, stop)
        done, step = end["status"] == 0, end["checkpoint_step"]
        if done and step > last:
            raise InputError(f"pretrain: {run_dir} has gone on to step {step}, and {STOP} is {stop}; use another `out`")
        return bool(done and step == last)
    except FileNotFoundError:
        return False
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir}: exit.json or config.yaml is damaged: {error}") from None


def _states(stages: list[Stage], queue: Mapping[str, str]) -> dict[str, str]:
    """`queued`, `done`, or to be `submitted`: from the end backwards, because what a product was made from may be gone."""
    states: dict[str, str] = {}
    settled = False
    for stage in reversed(stages):
        state = "queued" if stage.name in queue else "done" if settled or stage.made else "submitted"
        states[stage.name] = state
        settled = state != "submitted"
    return states


def _compare(stage: Stage, recorded: Mapping[str, Any] | None, state: str, job: str | None) -> None:
    """Raise InputError when what is done, begun or queued was asked for otherwise than now."""
    if recorded is None or (state == "submitted" and not stage.begun):
        return
    then, now = recorded["options"], stage.options
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    refused = [name for name in changed if not name.startswith(stage.may_change)]
    text = ", ".join(
        f"{name} {then.get(name, 'not given')}, now {now.get(name, 'not given')}" for name in refused or changed
    )
    if refused and state == "queued":
        raise InputError(f"{stage.name}: job {job} was submitted with {text}; scancel it first, or change it back")
    if refused:
        raise InputError(
            f"{stage.name}: {stage.product} was made with {text}; use another `out`, or remove it and what was made from it"
        )
    if changed and state == "queued":
        log(f"{stage.name}: job {job} was submitted with {text}, and stays so; submit again when it has ended")


def _command(stage: Stage, out: Path, options: list[str], after: str | None) -> list[str]:
    number = "%j" if stage.array is None else "%A_%a"
    log_file = str(out / "logs" / stage.name).replace("%", "%%") + f"-{number}.out"
    command = ["sbatch", *options, "--parsable", f"--job-name={stage.name}", f"--comment={out}"]
    command += [f"--output={log_file}", "--open-mode=append"]
    if stage.array is not None:
        command.append(f"--array=0-{stage.array - 1}")
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, f"slurm/{stage.script}.sbatch", *stage.arguments]


def _set_aside(stale: tuple[Path, ...]) -> None:
    for old in stale:
        if old.exists():
            new = old.with_name(f"{old.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
            old.rename(new)
            log(f"{old}: is now {new.name}, because the run goes on")


def _submit(stage: Stage, command: list[str], out: Path) -> str:
    done = _run(command, stage.environment)
    job = done.stdout.strip().split(";")[0]  # job;cluster
    if done.returncode != 0 or not job.isdecimal():
        raise RuntimeError(
            f"{stage.name}: {done.stderr.strip() or 'sbatch gave no id of a job'}; the jobs before it stay, and "
            f"{out / 'pipeline.json'} has them: submit again to go on. If Slurm took this one all the same, it is found then"
        )
    if done.stderr:
        log(done.stderr.rstrip())
    return job


def _queue(out: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Of the recorded stages those whose job waits or runs, with its id."""
    if not record:
        return {}
    done = _run(["squeue", "--noheader", f"--name={','.join(record)}", "--format=%F|%j|%r|%k"])
    if done.returncode != 0:
        raise RuntimeError(f"which jobs are queued? {done.stderr.strip() or 'squeue failed'}")
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        job, name, reason, comment = line.split("|", 3)
        # Such a job follows one that failed, and is about to be cancelled.
        if (job == record[name]["job"] or comment == str(out)) and reason != "DependencyNeverSatisfied":
            found[name] = max(job, found.get(name, job), key=int)
    return found


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Variables of a job in which we may be are not for the jobs that it submits."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    try:
        return subprocess.run(command, cwd=ROOT, env={**inherited, **(environment or {})}, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found; submit on a node that has Slurm's commands") from None


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    write_atomically(out / "pipeline.json", dump_json({"stages": record}))


def _read_record(path: Path) -> dict[str, Any]:
    """Of each stage that was ever submitted `options`, `command`, and `job`: None where Slurm gave no id."""
    try:
        stages: dict[str, Any] = json.loads(path.read_bytes())["stages"]
        return stages
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); see in squeue that none of its jobs is left, and remove it") from None


@contextmanager
def _alone(out: Path, dry_run: bool) -> Iterator[None]:
    """Make OUT and its logs/, and keep out whoever submits the same at the same time; a dry run changes nothing."""
    if dry_run:
        yield
        return
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with open(out / ".pipeline.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another submit is at work on it; wait for its end") from None
        yield


def _absolute(folder: Path, path: str) -> Path:
    """InputError for what Slurm would read otherwise in the name of a log."""
    absolute = os.path.abspath(folder / Path(path).expanduser())
    if not absolute.isprintable() or "\\" in absolute:
        raise InputError(f"{absolute!r}: no control characters or backslashes, please")
    return Path(absolute)


def _flags(options: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
