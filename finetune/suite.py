"""All tasks below a folder x seeds with one model: `python -m finetune gue`, alone or as an element of a job array.

The runs have a fixed order: tasks by name, each with its seeds. `finetune.run` knows a run that is done, so the same command
may be given again after anything, with more seeds, or divided in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log, one_line
from finetune.tasks import task_name

SPLIT_FILES = ("train.csv", "dev.csv", "test.csv")


def gue(
    model: str,
    data: Path,
    out: Path,
    *,
    seeds: int = 3,
    num_tasks: int | None = None,
    task: int | None = None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Do every `num_tasks`-th run from number `task` on, or all of them; return what `--json` prints.

    `names` chooses tasks such as tf/0; `options` are those of `finetune.run.run`. A run that fails doesn't keep the others
    from being done. Raises at the end InputError when bad input was all that failed, RuntimeError when running again may
    help.
    """
    from finetune.run import run  # here, because the rest of this module serves `slurm submit`, which imports no torch

    if seeds < 1:
        raise InputError(f"--seeds {seeds}: must be at least 1")
    if (num_tasks is None) != (task is None):
        raise InputError("--num-tasks and --task go together")
    if num_tasks is not None and task is not None and not 0 <= task < num_tasks:
        raise InputError(f"--task {task}: must be from 0 to --num-tasks - 1 = {num_tasks - 1}")
    folders = find_tasks(data, names)
    runs = [(name, seed) for name in folders for seed in range(seeds)]
    mine = runs[task or 0 :: num_tasks or 1]
    results: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    for number, (name, seed) in enumerate(mine, 1):
        log(f"run {number} of {len(mine)}: {name}, seed {seed}")
        try:
            results.append(run(model, folders[name], out, seed=seed, **options))
        except (InputError, RuntimeError) as error:
            log(f"{name}, seed {seed}, failed: {one_line(error)}")
            failed[f"{name} seed {seed}"] = error
    if failed:
        bad_input = all(isinstance(error, InputError) for error in failed.values())
        text = f"{len(failed)} of {len(mine)} runs failed, the log says why: {', '.join(failed)}"
        raise InputError(text) if bad_input else RuntimeError(text)
    return {"runs": len(mine), "already_done": sum(result["already_done"] for result in results), "results": results}


def find_tasks(data: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The folders below `data` with the three CSV files, by the task's name, sorted; all of them, or those of `names`.

    Raises InputError where there is none, or not one of `names`.
    """
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give one with tasks in it, such as GUE")
    folders = [path.parent for path in sorted(data.rglob(SPLIT_FILES[0]))]
    folders = [folder for folder in folders if all((folder / name).is_file() for name in SPLIT_FILES)]
    if not folders:
        raise InputError(f"{data}: no folder with {', '.join(SPLIT_FILES)} in it")
    tasks: dict[str, Path] = {}
    for folder in folders:
        other = tasks.setdefault(task_name(folder), folder)
        if other != folder:
            raise InputError(f"{other} and {folder} are both called {task_name(folder)}; rename one")
    if unknown := sorted(set(names or ()) - tasks.keys()):
        raise InputError(f"{data}: has no task {', '.join(unknown)}; it has {', '.join(sorted(tasks))}")
    return {name: tasks[name] for name in sorted(tasks) if not names or name in names}


def results_files(data: Path, out: Path, label: str, seeds: int, names: Sequence[str] | None = None) -> list[Path]:
    """Where all runs of a model called `label` leave their results; see `finetune.run`."""
    tasks = find_tasks(data, names)
    return [out / task.replace("/", "__") / label / f"seed-{seed}.json" for task in tasks for seed in range(seeds)]
