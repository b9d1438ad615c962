"""Where tasks lie: folders of train.csv, dev.csv and test.csv, single CSV files, and which of GUE's tasks a folder is.

A task is known by its folder below the benchmark's, such as `tf/0`. Copies of GUE that name their folders otherwise
(`emp_H3`, `human_tf_0`, `GUE/mouse_0`) are recognised; a folder that is none of its tasks keeps its own name, and so does a
single file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.cli import InputError
from finetune.tasks import PUBLISHED

SPLITS = ("train", "dev", "test")
FILE_NAMES = {"train": ("train.csv",), "dev": ("dev.csv", "valid.csv", "validation.csv", "val.csv"), "test": ("test.csv",)}
BENCHMARKS = ("gue", "gue+", "gue_plus", "gue_v2")  # names of the folder that has the tasks, in any case
EXPECTED = "a task is a folder with train.csv, dev.csv and test.csv (columns sequence,label), or one CSV file"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


# Names under which copies of the benchmark keep its tasks. The short ones could be anybody's: they count below GUE only.
_SHORT = {_plain(task): task for task in PUBLISHED if task.startswith(("tf/", "mouse/"))}
_ALIASES = {_plain(task): task for task in PUBLISHED if task not in _SHORT.values()}
_ALIASES |= {_plain(task.split("/")[1]): task for task in PUBLISHED if task.startswith("prom/")}
_ALIASES |= {f"human_{_plain(task)}": task for task in PUBLISHED if task.startswith("tf/")}


def task_name(path: Path) -> str:
    """The folder below its nearest parent called GUE, or its last two parts: `GUE/tf/0` is `tf/0`."""
    parts = Path(os.path.abspath(path)).parts  # a link keeps the name it was given
    benchmark = [number for number, part in enumerate(parts[:-1]) if part.lower() in BENCHMARKS]
    name = "/".join(parts[benchmark[-1] + 1 :] if benchmark else parts[1:][-2:])
    if name in PUBLISHED or path.suffix == ".csv":
        return name
    aliases = _ALIASES | (_SHORT if benchmark else {})
    return aliases.get(_plain(name)) or aliases.get(_plain(parts[-1])) or name


def split_files(folder: Path) -> dict[str, Path]:
    """The CSV files of a task's folder by split; those that are there."""
    found = {split: [folder / name for name in names if (folder / name).is_file()] for split, names in FILE_NAMES.items()}
    for files in found.values():
        if len(files) > 1:
            raise InputError(f"{files[0]} and {files[1]}: both could be the dev split; remove one")
    return {split: files[0] for split, files in found.items() if files}


def check_splits(path: Path) -> None:
    """InputError where a task can't be run for want of a file.

    train.csv is always needed. A user's own task may lack the others, which are then split off it; the benchmark's may not:
    a score on another test set would stand beside the published one.
    """
    if path.is_file():
        return
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; {EXPECTED}")
    files, name = split_files(path), task_name(path)
    missing = [split for split in SPLITS if split not in files]
    if "train" in missing:
        raise InputError(f"{path / 'train.csv'}: not found; {EXPECTED}{_other_files(path)}")
    if missing and name in PUBLISHED:
        raise InputError(
            f"{path / missing[0]}.csv: not found, and {name} is a task of the benchmark, which has {missing[0]} rows of "
            "its own; put the file there"
        )


def _folders(data: Path, wanted: set[str]) -> Iterator[Path]:
    """Folders with a file of one of these names; links are followed, each place is visited once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(data, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        if wanted & set(files):
            yield Path(folder)


def _other_files(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return f"; it has {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else "; the folder is empty"


def find_tasks(data: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The folders below `data` with any of the CSV files, by the task's name, sorted; all of them, or those of `names`.

    Raises InputError where there is none, or not one of `names`. Whether a task is whole is for `check_splits`.
    """
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give one with tasks in it, such as GUE")
    wanted = {name for names in FILE_NAMES.values() for name in names}
    tasks: dict[str, Path] = {}
    for folder in sorted(_folders(data, wanted)):
        other = tasks.setdefault(task_name(folder), folder)
        if other != folder:
            raise InputError(f"{other} and {folder} are both called {task_name(folder)}; rename one")
    if not tasks:
        raise InputError(f"{data}: no folder with {', '.join(f'{split}.csv' for split in SPLITS)} in it; {EXPECTED}")
    if unknown := sorted(set(names or ()) - tasks.keys()):
        raise InputError(f"{data}: has no task {', '.join(unknown)}; it has {', '.join(sorted(tasks))}")
    return {name: tasks[name] for name in sorted(tasks) if not names or name in names}
