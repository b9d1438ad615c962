"""Leases of real processes: killed, stopped, beating, replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.cli import InputError
from pretrain import lease as lease_module
from pretrain.lease import Lease, LeaseLost, holder
from tests.commands import ENVIRONMENT, ROOT

FAST = {"beat_seconds": 0.1, "dead_after_seconds": 2.0}

OWNER = """
import sys, time
from pathlib import Path
from pretrain.lease import Lease
Lease.take(Path(sys.argv[1]), sys.argv[2], beat_seconds=0.1)
print("taken", flush=True)
time.sleep(600)
"""

# Newcomers that take every directory at the same moment. In the last two, b is slow: between finding the owner dead and its
# last look, and between that and replacing the file.
RACER = """
import os, sys, time
from pathlib import Path
from data_prep.cli import InputError
from pretrain import lease

life, names = sys.argv[1], sys.argv[2:]
refuse, replace = lease._refuse_if_alive, os.replace

def slow_refuse(*arguments):
    refuse(*arguments)
    time.sleep(pause if name == names[-2] else 0)

def slow_replace(*arguments):
    time.sleep(pause / 3 if name == names[-1] else 0)
    replace(*arguments)

lease._refuse_if_alive, os.replace = slow_refuse, slow_replace
pause = 0.9 if life == "b" else 0.0
print("ready", flush=True)
start = float(sys.stdin.readline())
for number, name in enumerate(names):
    time.sleep(max(0, start + number - time.monotonic()))
    try:
        lease.Lease.take(Path(name), life).check()
        print(name, flush=True)
    except InputError as error:
        assert "is running here" in str(error), error
print("done", flush=True)
sys.stdin.readline()
"""


@contextmanager
def owner(run_dir: Path, life: str = "first") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run_dir), life], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pretend(run_dir: Path, **changes: object) -> None:
    """Change what lease.json says, in place, as its owner would."""
    record = json.loads((run_dir / "lease.json").read_text())
    (run_dir / "lease.json").write_text(json.dumps(record | changes, indent=2) + "\n")


def left_behind(run_dir: Path) -> None:
    """The lease of a process that was killed."""
    with owner(run_dir) as process:
        process.kill()


def test_a_lease_says_who_holds_it_and_goes_when_it_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run_dir = tmp_path / "new" / "run"
    lease = Lease.take(run_dir, "life", **FAST)
    held = holder(run_dir)
    assert held is not None
    assert (held["life"], held["host"], held["pid"], held["job"]) == ("life", socket.gethostname(), os.getpid(), "4711")
    wait_for(lambda: holder(run_dir) not in (None, held))
    lease.check()
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(InputError, match="Slurm job 4711 is running here; end it, or use another run_dir"):
        Lease.take(run_dir, "second", **FAST)
    lease.release()
    lease.release()
    assert list(run_dir.iterdir()) == [] and holder(run_dir) is None
    with pytest.raises(LeaseLost, match="removed"):
        lease.check()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_living_owner_keeps_its_lease_even_when_it_is_stopped(tmp_path: Path, stopped: bool) -> None:
    with owner(tmp_path) as process:
        if stopped:
            process.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match=f"{tmp_path}: life first on host {socket.gethostname()}, pid {process.pid} "):
            Lease.take(tmp_path, "second", beat_seconds=0.1, dead_after_seconds=0.2)


def test_a_later_start_of_the_same_job_takes_over_from_what_slurm_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    first = Lease.take(tmp_path, "first", **FAST)
    with pytest.raises(InputError, match="is running here"):
        Lease.take(tmp_path, "another step of the same start", **FAST)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    second = Lease.take(tmp_path, "second", **FAST)
    with pytest.raises(LeaseLost):
        first.check()
    second.check()
    first.release()
    second.release()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_lease_of_a_dead_process_is_taken_at_once(tmp_path: Path, reaped: bool) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with owner(tmp_path) as process:
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie stays
        lease = Lease.take(tmp_path, "second", dead_after_seconds=3600)
    lease.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease.json", "metrics.jsonl"]
    lease.release()


def test_a_process_number_that_is_in_use_again_is_not_the_owner(tmp_path: Path) -> None:
    left_behind(tmp_path)
    pretend(tmp_path, pid=os.getpid())
    Lease.take(tmp_path, "second", dead_after_seconds=3600).release()


@pytest.mark.parametrize("key", ["host", "boot_id", "pid_namespace"])
def test_elsewhere_only_the_beat_says_who_lives(tmp_path: Path, key: str) -> None:
    left_behind(tmp_path)
    pretend(tmp_path, **{key: "elsewhere"})
    ended = threading.Event()

    def beat() -> None:
        with (tmp_path / "lease.json").open("r+b") as stream:
            content = bytearray(stream.read())
            while not ended.wait(0.1):
                content[-5] = ord("0") + (content[-5] - ord("0") + 1) % 10
                os.pwrite(stream.fileno(), content, 0)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(InputError, match=r"life first on host .* is running here"):
            Lease.take(tmp_path, "second", **FAST)
    finally:
        ended.set()
        beating.join()
    Lease.take(tmp_path, "second", **FAST).check()


def test_a_file_that_is_no_lease_is_taken_when_nobody_writes_it(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"life": ')
    assert holder(tmp_path) is None
    lease = Lease.take(tmp_path, "second", **FAST)
    lease.check()
    lease.release()


def test_an_owner_that_was_replaced_notices_and_leaves_the_new_lease_alone(tmp_path: Path) -> None:
    old = Lease.take(tmp_path, "old", **FAST)
    (tmp_path / "lease.json").rename(tmp_path / "old.json")  # to see the old one's beats
    new = Lease.take(tmp_path, "new", beat_seconds=3600)
    before, beat = (tmp_path / "lease.json").read_bytes(), (tmp_path / "old.json").read_bytes()
    wait_for(lambda: (tmp_path / "old.json").read_bytes() != beat)
    with pytest.raises(LeaseLost, match="not held by life old any more, but by life new on host"):
        old.check()
    old.release()
    assert (tmp_path / "lease.json").read_bytes() == before
    new.check()
    new.release()


def test_a_disk_that_can_not_say_who_holds_the_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RETRY_SECONDS", 0.01)
    lease = Lease.take(tmp_path, "life", beat_seconds=3600)
    (tmp_path / "lease.json").unlink()
    (tmp_path / "lease.json").mkdir()
    with pytest.raises(RuntimeError, match=r"lease.json: Is a directory") as raised:
        lease.check()
    assert not isinstance(raised.value, LeaseLost)


@pytest.mark.parametrize("dead", [True, False])
def test_of_newcomers_at_the_same_moment_exactly_one_wins(tmp_path: Path, dead: bool) -> None:
    directories = [tmp_path / f"run{number}" for number in range(6)]
    if dead:
        left_behind(tmp_path)
    for directory in directories:
        directory.mkdir()
        if dead:
            (directory / "lease.json").write_bytes((tmp_path / "lease.json").read_bytes())
    command, names = [sys.executable, "-c", RACER], [str(directory) for directory in directories]
    racers = [
        subprocess.Popen(
            [*command, life, *names], cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for life in "ab"
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    start = time.monotonic() + 0.2
    for racer in racers:
        assert racer.stdin is not None
        print(start, file=racer.stdin, flush=True)
    taken: list[str] = []
    for racer in racers:  # both live until both have tried every directory
        assert racer.stdout is not None
        taken += iter(lambda stream=racer.stdout: stream.readline().strip(), "done")
    for racer in racers:
        racer.communicate(timeout=60)
        assert racer.returncode == 0
    assert sorted(taken) == names


def test_a_copied_run_directory_is_not_held_by_the_owner_of_the_original(tmp_path: Path) -> None:
    with owner(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        Lease.take(tmp_path / "copy", "copy", **FAST).release()
        with pytest.raises(InputError, match="is running here"):
            Lease.take(tmp_path / "run", "second", **FAST)
