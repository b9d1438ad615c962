"""All tasks below a folder x models x seeds: `python -m finetune gue`, alone or as an element of a job array.

The runs have a fixed order: tasks by name, then models, then seeds. `finetune.run` knows a run that is done, so the same
command may be given again after anything, with more seeds or baselines, or divided in another way. With several GPUs each
has a process of its own, which takes the next run when it is done with one; what happens to one of them fails that run
and no other.
"""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_prep.cli import BAD_INPUT, FAILED, InputError, StopRequested, exit_status, log, one_line, stoppable
from finetune.folders import check_splits, find_tasks
from finetune.results import BASELINES, RANDOM, is_deterministic, label_of, method_of, result_path, write_failure
from finetune.tasks import STRICT_SEEDS

ENCODER_ONLY = ("label", "like", "learning_rate", "pooling")  # options that mean nothing to a baseline without encoder


@dataclass(frozen=True)
class Run:
    """One of the suite's runs."""

    task: str
    folder: Path
    model: str
    seed: int
    options: Mapping[str, Any]  # of `finetune.run.run`

    @property
    def label(self) -> str:
        options = self.options
        method = method_of(self.model, options.get("method"))
        return label_of(self.model, options.get("like"), options.get("label"), method, options.get("pooling"))

    def result(self, out: Path) -> Path:
        return result_path(out, self.task, self.label, self.seed)


def plan_runs(
    model: str,
    data: Path,
    *,
    seeds: int = 3,
    names: Sequence[str] | None = None,
    baselines: Sequence[str] = (),
    **options: Any,
) -> list[Run]:
    """Every run, in order. Fits that no seed changes are done once.

    `baselines` are `kmer`, `cnn`, `random` (with the architecture and tokenizer of `model`) or other checkpoints.
    Raises InputError where two models would have one label, or a task isn't there.
    """
    models: list[tuple[str, dict[str, Any]]] = [(model, dict(options))]
    for baseline in baselines:
        given = {key: value for key, value in options.items() if key != "label"}
        if baseline in BASELINES:
            given = {key: value for key, value in given.items() if key not in (*ENCODER_ONLY, "method")}
        elif baseline == RANDOM:
            given["like"] = None if model in (RANDOM, *BASELINES) else model
        else:
            given.pop("like", None)
        models.append((baseline, given))
    runs = []
    for task, folder in find_tasks(data, names).items():
        for chosen, given in models:
            once = is_deterministic(chosen, method_of(chosen, given.get("method")))
            runs += [Run(task, folder, chosen, seed, given) for seed in range(1 if once else seeds)]
    labels = [Run("", data, chosen, 0, given).label for chosen, given in models]
    for number, label in enumerate(labels):
        if label in labels[:number]:
            raise InputError(f"two of the models are called {label}; leave one out, or rename its folder")
    return runs


def gue(
    model: str,
    data: Path,
    out: Path,
    *,
    seeds: int = 3,
    num_tasks: int | None = None,
    task: int | None = None,
    processes: int | None = None,
    protocol: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Do every `num_tasks`-th run from number `task` on, or all of them; return what `--json` prints.

    `processes` is their number on a machine without GPU; on one with GPUs there is one a GPU. `options` are those of
    `plan_runs` and `finetune.run.run`. A run that fails leaves a file that says so and doesn't keep the others from being
    done. Raises at the end InputError when bad input was all that failed, RuntimeError when running again may help.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: must be at least 1")
    if protocol == "strict" and seeds < STRICT_SEEDS:
        raise InputError(f"--seeds {seeds}: the strict protocol has at least {STRICT_SEEDS}; leave out --protocol for a try")
    if (num_tasks is None) != (task is None):
        raise InputError("--num-tasks and --task go together")
    if num_tasks is not None and task is not None and not 0 <= task < num_tasks:
        raise InputError(f"--task {task}: must be from 0 to --num-tasks - 1 = {num_tasks - 1}")
    if processes is not None and processes < 1:
        raise InputError(f"--processes {processes}: must be at least 1")
    runs = plan_runs(model, data, seeds=seeds, protocol=protocol or "strict", **options)
    from finetune.sources import check_model  # here, for it needs torch

    for name in {run.model for run in runs} | {like for run in runs if (like := run.options.get("like"))}:
        check_model(name)  # now, not after the runs of others
    mine = runs[task or 0 :: num_tasks or 1]
    if not mine:
        log(f"there are {len(runs)} runs, of which none falls to --task {task} of {num_tasks}")
    suite = _Suite(mine, out)
    with stoppable():
        suite.work(*_devices(processes))
    if suite.failed:
        text = f"{len(suite.failed)} of {len(mine)} runs failed, the log says why: {', '.join(sorted(suite.failed))}"
        raise InputError(text) if all(status == BAD_INPUT for status in suite.failed.values()) else RuntimeError(text)
    done = [result for result in suite.results if result is not None]
    return {"runs": len(mine), "already_done": sum(result["already_done"] for result in done), "results": done}


def _devices(processes: int | None) -> tuple[list[dict[str, str]], bool]:
    """The environment of each process: which GPU it sees, or how many threads it has; and whether they are processes apart.

    A GPU is always used by a process apart: an error on it can leave a process unable to use it.
    """
    import torch

    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == gpus else [str(number) for number in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names], True
    if processes is None or processes == 1:
        return [{}], False
    return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}] * processes, True


class _Suite:
    """The runs still to do, and what has come of the others."""

    def __init__(self, runs: Sequence[Run], out: Path) -> None:
        self.runs, self.out = runs, out
        self.results: list[dict[str, Any] | None] = [None] * len(runs)
        self.failed: dict[str, int] = {}  # run -> exit status that its failure stands for
        self.stopping = threading.Event()

    def work(self, devices: Sequence[Mapping[str, str]], apart: bool) -> None:
        """Do all runs, in a process for each device or in this one."""
        if not apart:
            for number in range(len(self.runs)):
                self._do(number, lambda run: _execute(run, self.out))
            return
        left: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for number in (*range(len(self.runs)), *[None] * len(devices)):
            left.put(number)
        workers = [_Worker(device, self.out) for device in devices]
        threads = [threading.Thread(target=self._serve, args=(left, worker), daemon=True) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)  # signals are heeded in between
        finally:
            self.stopping.set()
            for worker in workers:
                worker.stop()
        missing = [run for run, result in zip(self.runs, self.results, strict=True) if result is None]
        if len(missing) != len(self.failed):
            raise RuntimeError(f"{len(missing) - len(self.failed)} of {len(self.runs)} runs were not done; run again")

    def _serve(self, left: queue.SimpleQueue[int | None], worker: _Worker) -> None:
        while (number := left.get()) is not None and not self.stopping.is_set():
            self._do(number, worker.execute)

    def _do(self, number: int, execute: Callable[[Run], dict[str, Any]]) -> None:
        run = self.runs[number]
        log(f"run {number + 1} of {len(self.runs)}: {run.task}, {run.label}, seed {run.seed}")
        try:
            self.results[number] = execute(run)
        except StopRequested:
            raise
        except Exception as error:  # whatever it is, it is this run's
            if self.stopping.is_set():  # its process was ended
                return
            kind = "" if isinstance(error, (InputError, RuntimeError)) else f"{type(error).__name__}: "
            log(f"{run.task}, {run.label}, seed {run.seed}, failed: {kind}{one_line(error)}")
            status = exit_status(error)
            self.failed[f"{run.task} {run.label} seed {run.seed}"] = status if status == BAD_INPUT else FAILED
            try:
                write_failure(run.result(self.out), run.task, run.label, run.seed, error)
            except OSError as unwritable:
                log(f"{self.out}: can't be written, so the failure isn't noted there: {unwritable.strerror}")


class _Worker:
    """A process that does one run after another; where it dies, the next run gets a new one."""

    def __init__(self, device: Mapping[str, str], out: Path) -> None:
        self.device, self.out, self.lock, self.stopped = dict(device), out, threading.Lock(), False
        self._begin()

    def _begin(self) -> None:
        context = get_context("spawn")  # a fork can't use a GPU
        with self.lock:
            if self.stopped:
                return
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve_runs, args=(theirs, self.device, self.out), daemon=True)
            self.process.start()
            theirs.close()  # so that its end is seen

    def execute(self, run: Run) -> dict[str, Any]:
        """The run's result, or what it raised; RuntimeError where the process died."""
        try:
            self.pipe.send(run)
            answer, goes_on = self.pipe.recv()
        except Exception as error:  # EOFError, OSError, or what can't be unpickled
            self.process.kill()
            self.process.join()
            self._begin()
            died = isinstance(error, (EOFError, OSError))
            why = "its process died; the log may say why, or it ran out of memory" if died else f"no answer: {error}"
            raise RuntimeError(why) from None
        if not goes_on:
            self.process.join()
            self._begin()
        if isinstance(answer, BaseException):
            raise answer
        return dict(answer)

    def stop(self) -> None:
        """End the process, whatever it does; no other comes after it."""
        with self.lock:
            self.stopped = True
            self.process.terminate()
            self.process.join(5)
            self.process.kill()
            self.process.join()


def _serve_runs(pipe: Connection, device: Mapping[str, str], out: Path) -> None:
    """In a process of its own: do what comes, until nothing comes any more."""
    os.environ.update(device)  # CUDA reads it when it starts
    if threads := device.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    goes_on = True
    while goes_on:
        try:
            run = pipe.recv()
        except EOFError:  # the suite is done, or was killed
            return
        try:
            with redirect_stderr(_Prefixed(f"{run.task} {run.label} {run.seed} | ")):
                answer: object = _execute(run, out)
        except InputError as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")  # which can be sent for certain
            goes_on = False  # an error on a GPU can leave a process unable to use it
        try:
            pipe.send((answer, goes_on))
        except OSError:
            return


class _Prefixed(io.TextIOBase):
    """Standard error with the run's name before each line: the lines of several processes come mixed."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.stream, self.line = prefix, sys.stderr, ""

    def write(self, text: str) -> int:
        *whole, self.line = (self.line + text).split("\n")
        self.stream.write("".join(f"{self.prefix}{line}\n" for line in whole))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def _execute(run: Run, out: Path) -> dict[str, Any]:
    """Do one run; in a process of its own or in this one."""
    from finetune.run import run as run_once  # here: the rest of this module serves `slurm/pipeline.py`, which has no torch

    check_splits(run.folder)
    return run_once(run.model, run.folder, out, seed=run.seed, **run.options)


def results_files(model: str, data: Path, out: Path, **options: Any) -> list[Path]:
    """Where all runs leave their results; the arguments are those of `plan_runs`."""
    return [run.result(out) for run in plan_runs(model, data, **options)]
