"""`python -m slurm clean`: lists what nobody needs any more, and removes it with --yes.

Looks for run directories, outputs of pipelines, finished datasets and caches of datasets at or below the given paths, and in
each only for what the project's own code leaves behind, by its names. Follows no symbolic link below a path.

    run directory   checkpoints/step-*.tmp-*, .damaged-*, .left-*; what our code writes into hangs/ and profile/; torn
                    temporaries of its small files; an hour after, what killed checks left. Not where somebody runs, or may
                    run. --finished-checkpoints: of finished runs all steps but the last
    pipeline's out  hf.before-*, results.before-*, report.before-*, set aside when its run went on; torn temporaries
    dataset         with a manifest: .work/, temporaries in train/ and valid/
    cache           of datasets at URLs (data.cache_dir): blocks that were not read for so long; they are fetched again
    --scratch       dnabert2-USER-JOB in $LOCAL_SCRATCH of this node, of jobs that Slurm doesn't know any more
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shlex
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import yaml

from data_prep.cli import DONE, InputError, log, one_line
from data_prep.storage import file_sha256
from pretrain.lease import holder
from slurm.jobs import known_jobs, owner_lives

RANDOM = r"[a-z0-9_]{8}"  # what tempfile puts into a name
RUN_FILES = r"config\.yaml|tokenizer\.json|metrics\.jsonl|bad_steps\.jsonl|lease\.json|exit\.json"
SECTIONS = {"run_dir", "data", "model", "train", "optimizer", "validation", "checkpoint", "watchdog", "deepspeed"}
RUN_TEMPORARY = re.compile(rf"\.({RUN_FILES})\.{RANDOM}")
OF_CHECKS = re.compile(rf"\.preflight-{RANDOM}|\.preflight\.json\.{RANDOM}")
CHECKS_SECONDS = 3600.0  # more than they take; they hold no lease that says that they are at work
BEFORE_A_RUN = re.compile(rf"{OF_CHECKS.pattern}|(preflight|exit|lease|tokenizer)\.json")
LIFE = r"\d{8}T\d{6}-[0-9a-f]{6}"
REPORTS = {  # directories of a run, and what pretrain.watchdog and pretrain.profiling write there
    "hangs": ("stacks of ranks that hung", re.compile(rf"{LIFE}-rank-\d{{5,}}\.txt")),
    "profile": (
        "a profile",
        re.compile(rf"\.?rank-00000-steps-\d+-\d+\.json\.gz|summary\.json|\.summary\.json\.{RANDOM}"),
    ),
}
PIPELINE_TEMPORARY = re.compile(rf"\.pipeline\.json\.{RANDOM}")
BEFORE = re.compile(r"(hf|results|report)\.before-\d{8}T\d{6}")
SPLIT_TEMPORARY = re.compile(
    rf"\.(\d{{6}}\.tar\.{RANDOM}\.partial|(\d{{6}}\.index\.npy|shards\.npy|contigs\.tsv)\.{RANDOM})"
)
CACHED = re.compile(rf"[0-9a-f]{{64}}(-\d+)?|\.{RANDOM}")
HEX = re.compile("[0-9a-f]{2}")
STEP = re.compile(r"step-(\d+)")
SET_ASIDE = {
    "tmp": "a checkpoint that its life did not finish",
    "damaged": "a checkpoint that was found damaged",
    "left": "a checkpoint that its run went back from",
}
SET_ASIDE_NAME = re.compile(r"step-\d+\.(tmp|damaged|left)-.+")
RENAMED = re.compile(f"{SET_ASIDE_NAME.pattern}|{BEFORE.pattern}")


class Leftover(NamedTuple):
    """Something to remove, and why; with `parts`, only those."""

    path: Path
    why: str
    parts: tuple[Path, ...] = ()

    def changed(self) -> float:
        return max(_changed(path) for path in self.parts or [self.path])

    def described(self) -> dict[str, Any]:
        """Its line of the list."""
        size = sum(one.st_size for path in self.parts or [self.path] for one in _stats(path) if stat.S_ISREG(one.st_mode))
        age = (time.time() - self.changed()) / 86400
        return {"path": str(self.path), "bytes": size, "age_days": age, "why": self.why}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("paths", type=Path, nargs="*", metavar="PATH", help="looked through with everything below")
    parser.add_argument(
        "--older-than", type=float, default=7, metavar="DAYS", help="what was written since is kept (default: 7)"
    )
    parser.add_argument(
        "--finished-checkpoints", action="store_true", help="of finished runs, remove all checkpoints but the last"
    )
    parser.add_argument(
        "--scratch",
        action="store_true",
        help="remove what ended jobs left in $LOCAL_SCRATCH (default: $TMPDIR or /tmp) of this node, however old; "
        "`srun --ntasks-per-node=1 --nodes=...` asks all nodes",
    )
    parser.add_argument("--yes", action="store_true", help="remove it; without, it is only listed")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: list, and remove if told to. Returns `found` [{path, bytes, age_days, why}], `kept` [{path, why}], the sum
    of `bytes`, and `removed`, whether it is gone now.

    Raises InputError for a path that isn't there, RuntimeError at the end when something could not be removed.
    """
    if not args.paths and not args.scratch:
        raise InputError("name a PATH, or --scratch")
    if not args.older_than >= 0:
        raise InputError(f"--older-than {args.older_than}: must be a number of days, 0 or more")
    before = time.time() - args.older_than * 86400
    kept: list[dict[str, str]] = []
    leftovers: list[Leftover] = []
    for path in args.paths:
        if not path.is_dir():
            raise InputError(f"{path}: no such directory")
        leftovers += _below(path.resolve(), before, args.finished_checkpoints, kept)
    if args.scratch:
        leftovers += _scratch()

    rows: list[dict[str, Any]] = []
    failed = 0
    for leftover in {one.path: one for one in leftovers}.values():  # paths can overlap
        row = leftover.described()
        log(f"{_size(row['bytes']):>10} {row['age_days']:>6.0f} days  {row['path']}  ({row['why']})")
        rows.append(row)
        for part in leftover.parts or [leftover.path] if args.yes else []:
            try:
                _remove(part)
            except OSError as error:
                failed += 1
                log(f"can't be removed: {one_line(error)}")
    for one in kept:
        log(f"left alone: {one['path']}: {one['why']}")
    total = sum(row["bytes"] for row in rows)
    log(f"{len(rows)} leftovers, {_size(total)}")
    if rows and not args.yes:
        log(f"nothing is removed yet; to do it: {_command(args)}")
    if failed:
        raise RuntimeError(f"{failed} files or directories could not be removed; each is named above")
    return {"found": rows, "kept": kept, "bytes": total, "removed": args.yes}


def _below(top: Path, before: float, finished_checkpoints: bool, kept: list[dict[str, str]]) -> Iterator[Leftover]:
    """All leftovers at or below a directory that were last written `before`; what is in use is added to `kept`."""

    def unreadable(error: OSError) -> None:
        kept.append({"path": str(error.filename), "why": f"can't be looked through: {error.strerror}"})

    for name, directories, files in os.walk(top, onerror=unreadable):  # follows no links
        path = Path(name)
        found: Iterable[Leftover] = []
        if "config.yaml" in files and _is_directory(path / "checkpoints") and _is_run(path):
            if why := _in_use(path):
                kept.append({"path": name, "why": why})
            else:
                found = _of_run(path)
                if finished_checkpoints:
                    found = [*found, *_earlier_checkpoints(path, before, kept)]
        elif files and not directories and all(BEFORE_A_RUN.fullmatch(file) for file in files):
            found = _of_checks(path)
        elif "pipeline.json" in files and _is_pipeline(path):
            yield from (one for one in _of_pipeline(path) if one.changed() < before)
            directories[:] = [name for name in directories if not BEFORE.fullmatch(name)]
            continue  # with what is below: the run, the dataset
        elif "manifest.json" in files and "train" in directories and _is_dataset(path):
            found = _of_dataset(path)
        elif {"blocks", "files"} == set(directories) and not files and _is_cache(path):
            found = _of_cache(path, before)
        else:
            continue
        directories.clear()
        yield from (one for one in found if one.changed() < before)


def _is_run(path: Path) -> bool:
    """Whether config.yaml is as `pretrain train` writes it, with all sections."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.keys() >= SECTIONS


def _in_use(run_dir: Path) -> str | None:
    """Why a run directory must be left alone, or None."""
    lease = holder(run_dir)
    if lease is None:
        return "its lease.json can't be read" if (run_dir / "lease.json").exists() else None
    alive = owner_lives(run_dir, lease)
    if alive is None:
        return f"a run may live here, on host {lease.get('host')}; run this there"
    return "a run lives here" if alive else None


def _of_run(run_dir: Path) -> Iterator[Leftover]:
    for path in _entries(run_dir / "checkpoints"):
        if (aside := SET_ASIDE_NAME.fullmatch(path.name)) and _is_directory(path):
            yield Leftover(path, SET_ASIDE[aside[1]])
    for name, (why, pattern) in REPORTS.items():
        inside = _entries(run_dir / name)
        ours = [path for path in inside if pattern.fullmatch(path.name) and _is_file(path)]
        if ours:  # the directory goes when nothing else is in it
            yield Leftover(run_dir / name, why, () if ours == inside else tuple(ours))
    yield from _of_checks(run_dir)
    for path in _entries(run_dir):
        if RUN_TEMPORARY.fullmatch(path.name) and _is_file(path):
            yield Leftover(path, "a file that its life did not finish")


def _of_checks(run_dir: Path) -> Iterator[Leftover]:
    for path in _entries(run_dir):
        if OF_CHECKS.fullmatch(path.name) and _is_file(path) and time.time() - _changed(path) > CHECKS_SECONDS:
            yield Leftover(path, "a file of checks that were killed")


def _is_pipeline(path: Path) -> bool:
    record = _json(path / "pipeline.json")
    return isinstance(record, dict) and isinstance(record.get("stages"), dict)


def _of_pipeline(out: Path) -> Iterator[Leftover]:
    for path in _entries(out):
        if BEFORE.fullmatch(path.name) and _is_directory(path):
            yield Leftover(path, "made from the run as it was before it went on")
        elif PIPELINE_TEMPORARY.fullmatch(path.name) and _is_file(path):
            yield Leftover(path, "a file that a submit did not finish")


def _earlier_checkpoints(run_dir: Path, before: float, kept: list[dict[str, str]]) -> list[Leftover]:
    """All steps but the last, of a run that finished `before`."""
    steps = {int(found[1]): path for path in _entries(run_dir / "checkpoints") if (found := STEP.fullmatch(path.name))}
    paths = [steps[number] for number in sorted(steps) if _is_directory(steps[number])]
    if len(paths) < 2 or not _finished(run_dir, before):
        return []
    if not _is_whole(paths[-1]):
        kept.append({"path": str(paths[-1]), "why": "the last checkpoint is damaged, so the earlier ones are kept"})
        return []
    return [Leftover(path, "an earlier checkpoint of a finished run") for path in paths[:-1]]


def _finished(run_dir: Path, before: float) -> bool:
    path = run_dir / "exit.json"
    record = _json(path)
    return isinstance(record, dict) and record.get("status") == DONE and path.stat().st_mtime < before


def _is_whole(step: Path) -> bool:
    """Whether every file of a checkpoint has the manifest's size and sum: those before it are about to be removed."""
    manifest = _json(step / "MANIFEST.json")
    try:
        for name, entry in manifest["files"].items():
            if (step / name).stat().st_size != entry["bytes"] or file_sha256(step / name) != entry["sha256"]:
                return False
        return True
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def _is_dataset(path: Path) -> bool:
    manifest = _json(path / "manifest.json")
    return isinstance(manifest, dict) and {"format_version", "splits", "species"} <= manifest.keys()


def _of_dataset(dataset: Path) -> Iterator[Leftover]:
    if _is_directory(dataset / ".work"):
        yield Leftover(dataset / ".work", "the working state of a finished dataset")
    for split in ("train", "valid"):
        for path in _entries(dataset / split):
            if SPLIT_TEMPORARY.fullmatch(path.name) and _is_file(path):
                yield Leftover(path, "a file that its task did not finish")


def _is_cache(path: Path) -> bool:
    """Whether everything in it has a name that `data_prep.cache` gives."""
    blocks, files = _entries(path / "blocks"), _entries(path / "files")
    return all(HEX.fullmatch(one.name) for one in blocks) and all(CACHED.fullmatch(one.name) for one in files)


def _of_cache(cache: Path, before: float) -> Iterator[Leftover]:
    """Reading a block makes it young. Tokenizers and tables in files/ stay: they are small, and runs use them by path."""
    inside = (path for directory in _entries(cache / "blocks") for path in _entries(directory))
    old = [path for path in inside if CACHED.fullmatch(path.name) and _is_file(path) and _changed(path) < before]
    if old:
        yield Leftover(cache, f"{len(old)} blocks cached from URLs and not read since", tuple(old))


def _scratch() -> Iterator[Leftover]:
    """Directories of jobs on this node; only our own, as everybody may write to a node's disk."""
    scratch, user = Path(os.environ.get("LOCAL_SCRATCH") or gettempdir()), pwd.getpwuid(os.getuid()).pw_name
    name = re.compile(rf"dnabert2-{re.escape(user)}-(\d+)")
    here = [(path, found[1]) for path in _entries(scratch) if (found := name.fullmatch(path.name)) and _is_directory(path)]
    known = known_jobs()  # asked after looking: a job that starts now is known, or its directory is not among these
    for path, job in here:
        if job not in known and path.lstat().st_uid == os.getuid():
            yield Leftover(path, f"of job {job}, which has ended")


def _entries(directory: Path) -> list[Path]:
    """What lies in a directory; nothing where it is missing, unreadable or a symbolic link."""
    try:
        return sorted(directory.iterdir()) if _is_directory(directory) else []
    except OSError as error:
        log(f"can't be looked through: {one_line(error)}")
        return []


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if _is_file(path) else None
    except (OSError, ValueError):
        return None


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of a file, or of a directory and everything in it that is still there."""
    names = [str(path)]
    if _is_directory(path):
        names += [os.path.join(top, name) for top, inside, files in os.walk(path) for name in inside + files]
    for name in names:
        with suppress(OSError):
            yield os.lstat(name)


def _changed(path: Path) -> float:
    """When anything in it was last written, or it was set aside; now, if it is gone."""
    stats = list(_stats(path))
    renamed = [stats[0].st_ctime] if stats and RENAMED.fullmatch(path.name) else []  # mtime stays
    return max([*renamed, *(one.st_mtime for one in stats)], default=time.time())


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _remove(path: Path) -> None:
    if not _is_directory(path):
        path.unlink()
        return
    if STEP.fullmatch(path.name):  # a half-removed step must not be taken for a whole one
        path = path.rename(path.with_name(f"{path.name}.tmp-discarded"))
    shutil.rmtree(path)


def _command(args: argparse.Namespace) -> str:
    """The same again, with --yes."""
    words = ["python", "-m", "slurm", "clean", *map(str, args.paths), f"--older-than={args.older_than:g}"]
    words += ["--finished-checkpoints"] * args.finished_checkpoints + ["--scratch"] * args.scratch
    return shlex.join([*words, "--yes"])
