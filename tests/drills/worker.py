"""`python worker.py FAULT ARGUMENTS...`: `python -m pretrain ARGUMENTS`, where something happens at a chosen point.

FAULT is JSON: {"point": ..., "rank": ..., "step": ...} and what else the point needs. Nothing in the project knows of it:
the functions that a run calls at these instants are wrapped from outside. At most points the rank kills itself, or with
{"all": true} all ranks of its process group:

    update     gradients are ready, the optimizer has not moved
    copy       some of what the rank owns is copied, the rest isn't
    write      half of its file is written
    meet       its file is written, the other ranks don't know yet
    manifest   all files are there but MANIFEST.json
    rename     the manifest is written, the step has no name yet
    latest     the step has its name, LATEST is the old one
    retain     one file of an old step is deleted

At `fill` the rank fills the disk before it writes its file, but for {"bytes": ...}, with a file {"balloon": ...}. At `clock`
the wall clock is set by {"seconds": ...} before update `step` of this life, 0: from the start. libfaketime can't do that
here: under DONT_FAKE_MONOTONIC its clock_nanosleep fails (0.9.10), and without it timed waits of threads never end. So the
clock is shifted inside Python, which is all that the project asks for the time of day.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_prep.cli import leave, main
from pretrain import checkpoint, saver, zero_step
from pretrain.__main__ import build_parser


class Fault:
    """Its methods `at_<point>` wrap what a run calls."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.step = spec, spec["step"]
        self.name = checkpoint.step_path(Path(), self.step).name

    def strike(self) -> None:
        if self.spec.get("all"):
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def at_update(self) -> None:
        self._before_update(self.strike)

    def at_copy(self) -> None:
        def first_only(fragments: Iterable[Any]) -> Iterator[Any]:
            yield next(iter(fragments))
            self.strike()

        def start(self_: saver.Saver, step: int, fragments: Iterable[Any], *rest: Any) -> float:
            return real(self_, step, first_only(fragments) if step == self.step else fragments, *rest)

        real, saver.Saver.start = saver.Saver.start, start  # type: ignore[assignment,method-assign]

    def at_write(self) -> None:
        def half(tensors: dict[str, Any]) -> Iterator[Any]:
            data = b"".join(bytes(piece) for piece in real(tensors))
            yield data[: len(data) // 2]
            self.strike()

        real = checkpoint._safetensors
        self._around_write(before=lambda: setattr(checkpoint, "_safetensors", half))

    def at_meet(self) -> None:
        self._around_write(after=self.strike)

    def at_manifest(self) -> None:
        self._before_file(lambda path, _: path.name == "MANIFEST.json" and path.parent.name.startswith(self.name))

    def at_rename(self) -> None:
        def rename(source: Path, target: Path) -> None:
            if target.name == self.name:
                self.strike()
            os.rename(source, target)

        checkpoint.os = SimpleNamespace(**{**vars(os), "rename": rename})  # type: ignore[assignment]

    def at_latest(self) -> None:
        self._before_file(lambda path, data: path.name == "LATEST" and data.decode().strip() == self.name)

    def at_retain(self) -> None:
        def rmtree(path: Path) -> None:
            if checkpoint.steps(path.parents[1])[-1] == self.step:
                next(path.iterdir()).unlink()
                self.strike()
            shutil.rmtree(path)

        checkpoint.shutil = SimpleNamespace(**{**vars(shutil), "rmtree": rmtree})  # type: ignore[assignment]

    def at_fill(self) -> None:
        self._around_write(before=lambda: fill(Path(self.spec["balloon"]), self.spec["bytes"]))

    def at_clock(self) -> None:
        shift = 0.0
        real = SimpleNamespace(**vars(time))

        def set_back() -> None:
            nonlocal shift
            shift = self.spec["seconds"]

        time.time = lambda: real.time() + shift
        time.time_ns = lambda: int(time.time() * 1e9)
        time.gmtime = lambda seconds=None: real.gmtime(time.time() if seconds is None else seconds)
        time.localtime = lambda seconds=None: real.localtime(time.time() if seconds is None else seconds)
        time.strftime = lambda text, when=None: real.strftime(text, time.localtime() if when is None else when)
        if self.step == 0:
            set_back()
        else:
            self._before_update(set_back)

    def _before_update(self, act: Callable[[], None]) -> None:
        """In the chosen step, counted from the start of this life."""
        updates = 0

        def step(*arguments: Any, **options: Any) -> None:
            nonlocal updates
            updates += 1
            if updates == self.step:
                act()
            real(*arguments, **options)

        real, zero_step.step = zero_step.step, step

    def _around_write(self, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None) -> None:
        def write_rank(directory: Path, *arguments: Any) -> dict[str, Any]:
            if not directory.name.startswith(self.name):
                return real(directory, *arguments)
            before()
            listing = real(directory, *arguments)
            after()
            return listing

        real, checkpoint.write_rank = checkpoint.write_rank, write_rank  # type: ignore[assignment]

    def _before_file(self, is_ours: Callable[[Path, bytes], bool]) -> None:
        def write_atomically(path: Path, data: bytes) -> None:
            if is_ours(path, data):
                self.strike()
            real(path, data)

        real, checkpoint.write_atomically = checkpoint.write_atomically, write_atomically


def fill(balloon: Path, remaining: int) -> None:
    """Make the disk of `balloon` full but for `remaining` bytes, whatever else is written to it meanwhile."""
    with balloon.open("ab") as stream:
        while (more := shutil.disk_usage(balloon.parent).free - remaining) > 0:
            try:
                os.posix_fallocate(stream.fileno(), os.fstat(stream.fileno()).st_size, more)
            except OSError:  # another was faster
                time.sleep(0.001)


if __name__ == "__main__":
    fault = json.loads(sys.argv[1])
    if fault.get("rank") in (None, int(os.environ["RANK"])):
        getattr(Fault(fault), f"at_{fault['point']}")()
    leave(main(build_parser(), sys.argv[2:]))
