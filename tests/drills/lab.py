"""Where drills happen: a small dataset, the uninterrupted run, and runs in processes of their own that can be hurt."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from pretrain import checkpoint
from pretrain.checkpoint import DamagedError
from tests.commands import ENVIRONMENT, ROOT

WORKER = Path(__file__).with_name("worker.py")
RANKS, MAX_STEPS, SAVE_EVERY = 2, 24, 3
CONFIG = [
    "tiny",
    f"train.max_steps={MAX_STEPS}",
    "train.global_batch_size=11",  # divides by neither the ranks nor the micro batch
    "train.micro_batch_size=3",
    "train.log_every=1",
    "optimizer.warmup_steps=2",
    "validation.every=4",
    "validation.sequences=10",
    f"checkpoint.save_every={SAVE_EVERY}",
    "checkpoint.keep_last=2",
]
DEADLINE_SECONDS = 180.0  # for anything that has to happen
POLL_SECONDS = 0.01
Value = TypeVar("Value")


class Unavailable(Exception):
    """A drill that this machine does not allow."""


class Left(NamedTuple):
    """What a dead run has on disk."""

    last: int  # step in metrics.jsonl; 0: none
    whole: list[int]  # committed steps that verify
    under_way: bool  # a save had begun and was not committed

    @property
    def newest(self) -> int:
        return self.whole[-1] if self.whole else 0


class Life:
    """The processes of one life of a run; use `Run.start`.

    Ranks are started as `srun` does it, each by itself, in one process group. Under torchrun a launcher watches over them.
    """

    def __init__(self, command: list[str], logs: Path, ranks: int, torchrun: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.logs, self.group = logs, 0
        self.processes: list[subprocess.Popen[bytes]] = []
        logs.mkdir(parents=True)
        if torchrun:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
            self._spawn([*launcher, *command], {})
            return
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._spawn(command, {name: str(value) for name, value in place.items()})

    def _spawn(self, command: list[str], variables: dict[str, str]) -> None:
        with (self.logs / f"{len(self.processes)}.txt").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=ENVIRONMENT | variables,
                stdout=output,
                stderr=output,
                preexec_fn=lambda: os.setpgid(0, self.group),
            )
        self.group = self.group or process.pid
        self.processes.append(process)

    @property
    def text(self) -> str:
        """What its ranks have written so far."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.logs.iterdir()))

    @property
    def saved(self) -> list[int]:
        """The steps that it says it has committed."""
        return [int(step) for step in re.findall(r"^saved \S+/step-(\d+):", self.text, re.MULTILINE)]

    @property
    def resumed_from(self) -> int:
        found = re.search(r"^resumed from \S+/step-(\d+) ", self.text, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def statuses(self) -> list[int | None]:
        """Exit statuses, the number of a signal negative; None: not ended."""
        return [process.poll() for process in self.processes]

    @property
    def ended(self) -> bool:
        return None not in self.statuses

    def rank_under_torchrun(self, rank: int) -> psutil.Process | None:
        for child in psutil.Process(self.processes[0].pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank):
                    return child
        return None

    def until(self, happened: Callable[[], Value | None], what: str) -> Value:
        """What `happened()` returns as soon as that is true. Raises AssertionError when the life ends before that."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (value := happened()):
            assert not self.ended or happened(), f"ended with {self.statuses} before {what}"
            assert time.monotonic() < deadline, f"no {what} in {DEADLINE_SECONDS:g} s"
            time.sleep(POLL_SECONDS)
        return value

    def wait(self) -> list[int | None]:
        """Statuses, when all processes have ended."""
        self.until(lambda: self.ended, "end")
        return self.statuses

    def signal(self, number: int, *ranks: int) -> None:
        """To some ranks, or to all at once."""
        if not ranks:
            os.killpg(self.group, number)
        for rank in ranks:
            self.processes[rank].send_signal(number)

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
        self.wait()


class Run:
    """A run directory that drills break."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        self.path = directory / "run"
        self.disk: Path | None = None
        self.lives: list[Life] = []
        self._numbers = itertools.count()
        self.left: list[Left] = []  # before each life
        self.note = ""  # what the drill has done
        self.damaged: set[int] = set()  # steps that it has damaged
        self.expected: int | None = None  # the step that the next life must go on from

    def start(
        self, *overrides: str, ranks: int = RANKS, fault: dict[str, Any] | None = None, torchrun: bool = False
    ) -> Life:
        """Begin a life; `fault` is described in worker.py."""
        arguments = ["train", *CONFIG, f"data.path={self.lab.dataset}", f"run_dir={self.path}", *overrides]
        command = ["-m", "pretrain", *arguments] if fault is None else [str(WORKER), json.dumps(fault), *arguments]
        self.left.append(self.look())
        self.lives.append(Life(command, self.directory / f"logs-{next(self._numbers)}", ranks, torchrun))
        return self.lives[-1]

    def start_over(self) -> None:
        shutil.rmtree(self.path)
        self.lives, self.left, self.note = [], [], ""

    def move_to_small_disk(self, megabytes: int) -> Path:
        """Give the run a disk of its own, a tmpfs, and return where it is. Raises Unavailable where one can't be mounted."""
        disk = self.directory / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "drill", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"no right to mount a disk (in a container: --cap-add SYS_ADMIN): {done.stderr.strip()}")
        self.disk, self.path = disk, disk / "run"
        return disk

    def metrics(self) -> list[dict[str, Any]]:
        """Its records, but for a last line that is not finished."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []

    def last_step(self) -> int:
        return self.metrics()[-1]["step"] if self.metrics() else 0

    def exit(self) -> dict[str, Any]:
        path = self.path / "exit.json"
        assert path.is_file(), "no exit.json"
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def committed(self) -> list[int]:
        return checkpoint.steps(self.path)

    def look(self) -> Left:
        whole = []
        for step in self.committed():
            with contextlib.suppress(DamagedError):
                checkpoint.Checkpoint(checkpoint.step_path(self.path, step)).verify()
                whole.append(step)
        last = self.last_step()
        begun = last // SAVE_EVERY * SAVE_EVERY
        lost_sight_of = 0 < begun < last and begun not in self.committed()
        temporary = [path for path in self.path.glob("checkpoints/*.tmp-*") if not path.name.endswith("discarded")]
        return Left(last, whole, lost_sight_of or bool(temporary))

    def files_of_last_step(self) -> dict[str, str]:
        """sha256 of weights and moments, a file a rank."""
        files = checkpoint.step_path(self.path, MAX_STEPS).glob("*.safetensors")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}

    def log(self) -> str:
        return "".join(f"--- life {number}\n{life.text}" for number, life in enumerate(self.lives, 1))


class Lab:
    """One dataset, and runs on it.

    Args:
        directory: for everything; the caller removes it.
        dataset: a dataset directory; made here where none is given.
    """

    def __init__(self, directory: Path, dataset: Path | None = None) -> None:
        self.directory = directory
        self.dataset = dataset or self._make_dataset()
        self._runs = 0

    def _make_dataset(self) -> Path:
        genomes, tokenizer, dataset = (self.directory / name for name in ("synthetic", "tokenizer.json", "dataset"))
        small = ["--region-bases", "5000", "--unit-bases", "50000", "--valid-fraction", "0.1", "--streams", "8"]
        for arguments in (
            ["synthesize", "--out", genomes, "--bases", "400000", "--species", "3"],
            ["tokenizer", "--genomes", genomes / "genomes", "--out", tokenizer, "--vocab-size", "512"],
            ["shard", "--genomes", genomes / "genomes", "--tokenizer", tokenizer, "--out", dataset, *small],
        ):
            command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
            subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        return dataset

    @cached_property
    def uninterrupted(self) -> Run:
        """The run that all others must equal."""
        run = Run(self, self.directory / "uninterrupted")
        started = time.monotonic()
        assert run.start().wait() == [0] * RANKS, run.log()
        self._seconds = time.monotonic() - started
        return run

    @property
    def seconds(self) -> float:
        """How long the uninterrupted run took, its start included."""
        assert self.uninterrupted
        return self._seconds

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        """A fresh run directory; whatever happens, no process is left."""
        self._runs += 1
        run = Run(self, self.directory / f"drill-{self._runs}")
        run.directory.mkdir()
        try:
            yield run
        finally:
            for life in run.lives:
                life.end()
            if run.disk:
                subprocess.run(["umount", run.disk], check=True)
            shutil.rmtree(run.directory)
