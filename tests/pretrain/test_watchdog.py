"""Watchdogs of real processes that sleep, hold the interpreter lock, stand still or work."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain.watchdog import Entry, who_hangs
from tests.commands import ENVIRONMENT, ROOT

WORKER = """
import ctypes, json, os, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from pretrain import watchdog

run_dir, (rank, ranks, port), action = Path(sys.argv[1]), map(int, sys.argv[2:5]), sys.argv[5]
vars(watchdog).update(json.loads(sys.argv[6]))

def waits_for_a_batch():
    time.sleep(600)

def holds_the_lock():
    ctypes.PyDLL(None).sleep(600)

store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, timedelta(seconds=60)) if ranks > 1 else None
dog = watchdog.Watchdog(run_dir, rank, ranks, "life", store)
dog.enter("the start", 600)
if action == "works":
    for step in range(20):
        dog.enter(f"step {step}", 3)
        time.sleep(0.2)
    dog.close()
    time.sleep(4)
    sys.exit(0)
threading.Thread(target=waits_for_a_batch, name="prefetch", daemon=True).start()
if ranks > 1:  # all have published something before one of them is stopped
    store.set(f"ready/{rank}", "")
    store.wait([f"ready/{other}" for other in range(ranks)] + [f"watchdog/life/{other}" for other in range(ranks)])
    print("ready", flush=True)
    sys.stdin.readline()
dog.enter("step 17", 2)
holds_the_lock() if action == "holds the lock" else waits_for_a_batch()
"""


def start(
    run_dir: Path, action: str, *, rank: int = 0, ranks: int = 1, port: int = 0, **constants: float
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, (run_dir, rank, ranks, port)), action, json.dumps(constants)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left(run_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_dir / "exit.json").read_text())
    return record


def stacks(run_dir: Path, rank: int = 0) -> Path:
    return run_dir / "hangs" / f"life-rank-{rank:05d}.txt"


@contextmanager
def three_ranks(run_dir: Path, stopped: int, **constants: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that share a store of rank 0, one of which stands still before step 17."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(run_dir, "waits", rank=rank, ranks=3, port=port, **constants) for rank in range(3)]
    try:
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        ranks[stopped].send_signal(signal.SIGSTOP)
        for process in ranks:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
        yield [process for process in ranks if process is not ranks[stopped]]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_rank_that_makes_no_progress_leaves_its_stacks_and_ends_with_70(tmp_path: Path) -> None:
    process = start(tmp_path, "waits")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 70, errors
    assert errors == f"rank 0: no progress for 2 s in step 17; stacks are in {stacks(tmp_path)}\n"
    assert left(tmp_path)["status"] == 70 and left(tmp_path)["reason"] == "no progress for 2 s in step 17"
    text = stacks(tmp_path).read_text()
    head, _, dump = text.partition("\n\n")
    assert f"rank 0 of 1, host {socket.gethostname()}, pid {process.pid}\n" in head
    for name in ("MainThread", "prefetch"):
        (number,) = [line.split()[0] for line in text.splitlines() if line.endswith(f" {name}")]
        stack = dump.partition(f"hread {number} (")[2].partition("\n\n")[0]
        assert "in waits_for_a_batch" in stack


def test_one_that_works_lives_and_closing_disarms(tmp_path: Path) -> None:
    process = start(tmp_path, "works", BACKSTOP_SECONDS=0.5)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    assert list(tmp_path.iterdir()) == []


def test_holding_the_interpreter_lock_does_not_save_it(tmp_path: Path) -> None:
    process = start(tmp_path, "holds the lock", BACKSTOP_SECONDS=1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "in holds_the_lock" in errors


def test_a_disk_that_hangs_does_not_keep_it(tmp_path: Path) -> None:
    stacks(tmp_path).parent.mkdir()
    os.mkfifo(stacks(tmp_path))  # nobody reads it, so opening it waits for ever
    process = start(tmp_path, "waits", OUTPUT_SECONDS=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 70
    assert "in waits_for_a_batch" in errors and f"{stacks(tmp_path)} can't be written" in errors
    assert left(tmp_path)["status"] == 70


@pytest.mark.drill
def test_a_rank_that_is_stopped_is_named_by_the_first(tmp_path: Path) -> None:
    with three_ranks(tmp_path, stopped=1) as others:
        for process in others:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 70, errors
    assert left(tmp_path)["reason"] == (
        f"no progress for 2 s in step 17: rank 1 on host {socket.gethostname()} is silent, last heard of in the start"
    )
    assert stacks(tmp_path, 0).is_file() and stacks(tmp_path, 2).is_file() and not stacks(tmp_path, 1).is_file()


@pytest.mark.drill
def test_another_rank_speaks_where_the_first_is_stopped_and_its_store_with_it(tmp_path: Path) -> None:
    with three_ranks(tmp_path, stopped=0, FIRST_RANK_SECONDS=2) as others:
        for process in others:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 70, errors
    assert left(tmp_path)["status"] == 70
    assert "no progress for 2 s in step 17 on rank" in left(tmp_path)["reason"]
    assert "rank 0 has not written why" in left(tmp_path)["reason"]


FOLLOWER = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from pretrain import watchdog
watchdog.FOLLOW_SECONDS, watchdog.PUBLISH_SECONDS = 1.0, 0.2
dog = watchdog.Watchdog(Path(sys.argv[1]), 0, 2, "life", dist.HashStore(), lambda: "2 rank 1: no such block")
dog.enter("step 3", 600)
if sys.argv[2] == "leaves":
    dog.leave(600)
    time.sleep(4)
    sys.exit(0)
time.sleep(600)
"""


@pytest.mark.parametrize(("action", "status"), [("waits", 2), ("leaves", 0)])
def test_a_rank_follows_one_that_failed_unless_it_is_leaving_already(tmp_path: Path, action: str, status: int) -> None:
    command = [sys.executable, "-c", FOLLOWER, str(tmp_path), action]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    if status:
        assert left(tmp_path)["status"] == 2 and left(tmp_path)["reason"] == "rank 1: no such block"
        assert "rank 0 ends in step 3, because of rank 1: no such block" in done.stderr


def entry(counter: int, published: int, firing: bool = False) -> Entry:
    return Entry(counter, f"step {counter}", "node7", firing, published)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ([entry(9, 1), entry(9, 1)], [entry(9, 3), entry(9, 3)], "all 2 ranks live and are in it"),
        ([entry(9, 1), entry(8, 1)], [entry(9, 3), entry(8, 3)], "rank 1 on host node7 is still in step 8"),
        ([entry(9, 1), entry(9, 1)], [entry(9, 3), entry(9, 1)], "rank 1 on host node7 is silent, last heard of in step 9"),
        ([entry(9, 1), entry(9, 1, True)], [entry(9, 3), entry(9, 1, True)], "all 2 ranks live and are in it"),
        (
            [entry(9, 1), entry(9, 1), entry(7, 1), entry(8, 1)],
            [entry(9, 3), entry(9, 1), entry(7, 3), entry(8, 3)],
            "rank 1 on host node7 is silent, last heard of in step 9; rank 2 on host node7 is still in step 7",
        ),
    ],
)
def test_silent_ranks_and_those_in_the_earliest_phase_are_named(before: list[Entry], after: list[Entry], named: str) -> None:
    assert who_hangs(len(after), dict(enumerate(before)), dict(enumerate(after))) == named


def test_of_many_ranks_the_first_few_are_named() -> None:
    look = {0: entry(9, 1)}
    named = who_hangs(10_000, look, {0: entry(9, 2)})
    assert named == "rank 1 was never heard of; rank 2 was never heard of; rank 3 was never heard of; 9996 more"
