"""Ends a rank that makes no progress: its stacks on disk, the ranks that it waits for in exit.json, status 70.

A rank that hangs, or waits for one that does, can't raise an error: its main thread is inside a collective or a read. So a
thread watches the limit of the current phase. What it calls when that has passed may hang as well (the disk, the store, the
pipe behind stderr), and runs on further threads that are given up after some seconds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from data_prep.cli import HUNG, Hung, exit_status, log, one_line
from pretrain import run_directory
from pretrain.distributed import failure_of

Result = TypeVar("Result")
TICK_SECONDS = 1.0  # a limit is noticed at most so late
PUBLISH_SECONDS = 2.0
LOOK_SECONDS = 3 * PUBLISH_SECONDS  # between two looks at the other ranks: one that published nothing meanwhile is silent
ASK_SECONDS = LOOK_SECONDS + 4.0
OUTPUT_SECONDS = 5.0  # for a file or a line
FIRST_RANK_SECONDS = ASK_SECONDS + 5.0  # in which rank 0, which knows more, should have written exit.json
TURNS = 15  # after that the others, a second one after the other, as far as it goes
BACKSTOP_SECONDS = 60.0  # more than all of these together
FOLLOW_SECONDS = 60.0  # after another rank has failed
NAMED = 3  # ranks in a message


class Entry(NamedTuple):
    """What a rank last said about itself."""

    counter: int  # calls of `enter`
    phase: str
    host: str
    firing: bool
    published: int  # entries so far


class Watchdog:
    """Watches one rank, from now until `close`; without a limit until the first `enter`.

    When the limit of a phase passes, it writes every thread's stack to RUN_DIR/hangs/<life>-rank-<rank>.txt, says so in the
    log, has RUN_DIR/exit.json written by rank 0, or by another where rank 0 does not do it, and ends the process with status
    70. A process that was stopped (SIGSTOP) for longer than that ends when it goes on.

    Args:
        life: id of this process life of the run, equal on all ranks.
        store: of torch.distributed, with `multi_get`, shared by all ranks, to name the ranks that hang; None when alone. For
            that, all ranks must enter the same phases in the same order.
        reported_failure: what a rank that failed has told the others (`World.reported_failure`). Where the collective that
            this rank waits in does not break by itself, as NCCL's, it ends a minute later with that rank's status. So it
            does, with 70, when the process that holds the store is gone, which is rank 0's or torchrun's.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        ranks: int,
        life: str,
        store: Any | None = None,
        reported_failure: Callable[[], str] = lambda: "",
    ) -> None:
        self._run_dir, self._rank, self._ranks, self._life, self._store = run_dir, rank, ranks, life, store
        self._reported_failure, self._follows = reported_failure, True
        self._host = socket.gethostname()
        self._lock, self._closed, self._firing = threading.Lock(), threading.Event(), False
        self._counter, self._phase, self._limit, self._entered = 0, "the start", float("inf"), time.monotonic()
        _on_thread("watchdog", self._watch)
        if store is not None and ranks > 1:
            _on_thread("watchdog-publish", self._publish)

    def enter(self, phase: str, seconds: float) -> None:
        """Begin a phase, such as a step, that may take so long; the one before is over. Costs some 50 microseconds."""
        with self._lock:
            self._counter, self._phase, self._limit, self._entered = self._counter + 1, phase, seconds, time.monotonic()
        # No Python thread runs while one holds the interpreter lock inside C code. This one is C itself; it can do no more
        # than dump the stacks to stderr and end the process with status 1, without exit.json.
        faulthandler.dump_traceback_later(seconds + BACKSTOP_SECONDS, exit=True, file=2)

    def leave(self, seconds: float) -> None:
        """The last phase: this rank ends by itself within so long."""
        self._follows = False
        self.enter("leaving", seconds)

    def close(self) -> None:
        """Stop watching; no limit passes after that."""
        with self._lock:
            self._closed.set()
            if not self._firing:  # what has begun may still hang
                faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        left = 0.0
        while not self._closed.wait(min(left, TICK_SECONDS)):
            with self._lock:
                left = self._entered + self._limit - time.monotonic()
                self._firing = left <= 0 and not self._closed.is_set()
            if self._firing:
                self._fire()

    def _publish(self) -> None:
        assert self._store is not None
        published, reported, since = 0, "", float("inf")
        while not (since < float("inf") and not self._follows):
            published += 1
            with self._lock:
                entry = Entry(self._counter, self._phase, self._host, self._firing, published)
            try:
                self._store.set(self._key(self._rank), json.dumps(entry))
                reported = reported or self._reported_failure()
            except RuntimeError as error:  # its last word counts
                reported = reported or f"{HUNG} the process that holds the store is gone: {one_line(error)}"
            if reported:
                since = min(since, time.monotonic())
            if time.monotonic() - since > FOLLOW_SECONDS and self._follows:
                self._follow(reported)
            if self._closed.wait(PUBLISH_SECONDS):
                return

    def _follow(self, reported: str) -> NoReturn:
        failure = failure_of(reported)
        try:
            _within(OUTPUT_SECONDS, lambda: log(f"rank {self._rank} ends in {self._phase}, because of {failure}"))
            if self._rank == 0:
                _within(OUTPUT_SECONDS, lambda: self._write_exit(failure))
        finally:
            os._exit(exit_status(failure))

    def _write_exit(self, failure: Exception) -> None:
        if run_directory.is_ours(self._run_dir, self._life):
            run_directory.write_exit(self._run_dir, failure)

    def _fire(self) -> NoReturn:
        try:
            self._report()
            _within(OUTPUT_SECONDS, sys.stdout.flush)
        finally:
            os._exit(HUNG)

    def _report(self) -> None:
        phase, limit = self._phase, self._limit
        path = self._run_dir / "hangs" / f"{self._life}-rank-{self._rank:05d}.txt"
        where = f"stacks are in {path}"
        if not _within(OUTPUT_SECONDS, lambda: self._dump(path, phase, limit)):
            _within(OUTPUT_SECONDS, lambda: faulthandler.dump_traceback(file=2))
            where = f"stacks are above, because {path} can't be written"
        reason = f"no progress for {limit:g} s in {phase}"
        if self._rank > 0:
            reason += f" on rank {self._rank}, host {self._host}"
        elif self._ranks > 1:
            looks = None if self._store is None else _within(ASK_SECONDS, self._look_twice)
            reason += ": " + ("the other ranks can't be asked" if looks is None else who_hangs(self._ranks, *looks))
        _within(OUTPUT_SECONDS, lambda: log(f"rank {self._rank}: {reason}; {where}"))
        if self._rank > 0:
            if _within(FIRST_RANK_SECONDS + min(self._rank, TURNS), self._exit_is_written):
                return
            reason += "; rank 0 has not written why, so it hangs too or is gone"
        _within(OUTPUT_SECONDS, lambda: self._write_exit(Hung(reason)))

    def _dump(self, path: Path, phase: str, limit: float) -> bool:
        now, since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic() - self._entered
        who = f"rank {self._rank} of {self._ranks}, host {self._host}, pid {os.getpid()}"
        names = [f"0x{thread.ident or 0:016x} {thread.name}\n" for thread in threading.enumerate()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            stream.write(f"{now} {who}\nfor {since:.0f} s in {phase}, which may take {limit:g} s\n\nThreads:\n")
            stream.writelines([*names, "\n"])
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)
        return True

    def _look_twice(self) -> tuple[dict[int, Entry], dict[int, Entry]]:
        """What the ranks that ever published say, now and some seconds later."""
        assert self._store is not None
        known = [
            rank for rank in range(self._ranks) if self._store.check([self._key(rank)])
        ]  # get would wait for the others
        looks = []
        for wait in (0.0, LOOK_SECONDS):
            time.sleep(wait)
            values = self._store.multi_get([self._key(rank) for rank in known])
            looks.append({rank: Entry(*json.loads(value)) for rank, value in zip(known, values, strict=True)})
        return looks[0], looks[1]

    def _exit_is_written(self) -> bool:
        """Return when exit.json is there; the start of the run has removed that of an older life."""
        while not (self._run_dir / "exit.json").exists():
            time.sleep(TICK_SECONDS)
        return True

    def _key(self, rank: int) -> str:
        return f"watchdog/{self._life}/{rank}"


def who_hangs(ranks: int, before: dict[int, Entry], after: dict[int, Entry]) -> str:
    """Names the first of the ranks that are silent between two looks, or are in an earlier phase than others."""
    last = max((entry.counter for entry in after.values()), default=0)
    earliest = min((entry.counter for entry in after.values()), default=0)
    silent, behind = [], []
    for rank in range(ranks):
        if rank not in after:
            silent.append(f"rank {rank} was never heard of")
            continue
        entry = after[rank]
        if entry.published == before[rank].published and not entry.firing:  # one that fired has a right to be gone
            silent.append(f"rank {rank} on host {entry.host} is silent, last heard of in {entry.phase}")
        elif entry.counter == earliest < last:
            behind.append(f"rank {rank} on host {entry.host} is still in {entry.phase}")
    names = silent + behind
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return "; ".join(names[:NAMED] + more) or f"all {ranks} ranks live and are in it"


def _on_thread(name: str, action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, name=name, daemon=True)
    thread.start()
    return thread


def _within(seconds: float, action: Callable[[], Result]) -> Result | None:
    """What `action` returns; None when it fails, or is not done in time, and then its thread is left behind."""
    results: list[Result] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            log(f"watchdog: {type(error).__name__}: {one_line(error)}")

    _on_thread("watchdog-report", run).join(seconds)
    return results[0] if results else None
