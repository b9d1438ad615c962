"""One run at a time in a run directory: RUN_DIR/lease.json says which life holds it, and beats while that life lives.

File locks are not reliable on network disks, so the lease is a plain file. Its owner rewrites it in place, through a
descriptor that it keeps: where another life has replaced the file, the old beats go to the unlinked inode and hurt nobody.
A newcomer replaces the file only when its owner is dead: its process is gone from this machine, or its beat stands still.
Wall clocks are never compared, because hosts disagree about them and they are set back.

That leaves one case open: an owner that stood still (SIGSTOP, a disk that hangs) long enough to be taken for dead, and wakes
up. Whoever holds a lease therefore calls `check` before it changes what a second life would rely on.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log, one_line

LOOKS = 20  # at a beat, before its owner is dead
SETTLE_SECONDS = 0.5  # longer than a newcomer takes from its last look at a dead lease to its own
READ_ATTEMPTS, RETRY_SECONDS = 5, 1.0


class LeaseLost(RuntimeError):
    """Another life holds the run directory now."""


class Lease:
    """A run directory held by this process; made by `take`. Not to be used across a fork."""

    def __init__(self, path: Path, descriptor: int, record: dict[str, Any], beat_seconds: float) -> None:
        self._path, self._descriptor, self._record = path, descriptor, record
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat_seconds,), name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, run_dir: Path, life: str, *, beat_seconds: float = 5.0, dead_after_seconds: float = 20.0) -> Lease:
        """Hold `run_dir`, which is made where it is missing; nothing else in it is touched.

        Args:
            life: id of this process life of the run, for people.
            dead_after_seconds: an owner that can't be looked up on this machine is dead when its beat has not changed for so
                long; several times the `beat_seconds` of every run.

        Raises InputError when another life holds it, but for one of an earlier start of the same Slurm job.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "lease.json"
        token = uuid.uuid4().hex  # lives can share a name: started in one second, with one process number, on two hosts
        job = {"job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT")}
        record = {"life": life, "token": token, **job, **_this_process()}
        while True:
            found = _read(path)
            if found is not None:
                _refuse_if_alive(path, found, dead_after_seconds)
            descriptor = _replace(path, found, record)
            if descriptor is not None:
                return cls(path, descriptor, record, beat_seconds)

    def check(self) -> None:
        """Raise LeaseLost when lease.json is not ours any more, RuntimeError when it can't be read for some seconds."""
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(RETRY_SECONDS)
            try:
                content = _read(self._path)
            except OSError as error:
                problem = error  # of a network disk, that may pass
                continue
            if _token(content) == self._record["token"]:
                return
            now = "nobody; it was removed" if content is None else _name(_parse(content))
            raise LeaseLost(f"{self._path}: not held by life {self._record['life']} any more, but by {now}")
        raise RuntimeError(f"{one_line(problem)}; without it nobody knows whether another life has taken the run over")

    def release(self) -> None:
        """Stop beating, and remove the file if it is still ours."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(RETRY_SECONDS)
        if self._thread.is_alive():  # the disk hangs: the descriptor is in use, and removing the file would hang too
            return
        try:
            if _token(_read(self._path)) == self._record["token"]:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log(f"{one_line(error)}; the next life finds out by itself that this one has ended")
        os.close(self._descriptor)

    def _beat(self, beat_seconds: float) -> None:
        beat, failing = 0, False
        while not self._released.wait(beat_seconds):
            beat += 1
            try:
                os.pwrite(self._descriptor, _content(self._record, beat), 0)
                os.fsync(self._descriptor)
                failing = False
            except OSError as error:
                if not failing:
                    log(f"{self._path}: can't be written, trying on: {one_line(error)}")
                failing = True


def holder(run_dir: Path) -> dict[str, Any] | None:
    """What lease.json says, whether its owner lives or not; None when there is none or it is unreadable.

    `life`, `token`, `inode` of the file, `host`, `pid` and `pid_start` (clock ticks after boot), `boot_id`,
    `pid_namespace`, `job` and `restart` (Slurm's, or None), `beat` (a string of twelve digits).
    """
    try:
        content = _read(run_dir / "lease.json")
    except OSError:
        return None
    return None if content is None else _parse(content)


def _content(record: dict[str, Any], beat: int) -> bytes:
    """Always as long for the same record, so that a beat overwrites all of the one before."""
    return (json.dumps({**record, "beat": f"{beat:012d}"}, indent=2) + "\n").encode()


def _read(path: Path) -> bytes | None:
    """The file, opened anew each time because of the caches of network disks; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _token(content: bytes | None) -> str | None:
    """Whose a lease is; None for a file that is missing or can't be parsed."""
    record = None if content is None else _parse(content)
    return None if record is None else record.get("token")


def _name(record: dict[str, Any] | None) -> str:
    if record is None:
        return "a life whose lease can't be parsed"
    job = f", Slurm job {record['job']}" if record.get("job") else ""
    return f"life {record.get('life')} on host {record.get('host')}, pid {record.get('pid')}{job}"


def _refuse_if_alive(path: Path, content: bytes, dead_after_seconds: float) -> None:
    """Raise InputError when the owner lives; return when it is dead or somebody else has changed the file."""
    owner = _parse(content)
    if owner is not None and is_given_up(owner):
        return
    alive = None if owner is None else is_alive(owner)
    if owner is not None and alive and owner.get("inode") != path.stat().st_ino:
        return  # a copy of the run directory; its owner runs in the original
    if alive is None:
        log(f"{path}: held by {_name(owner)}; watching for {dead_after_seconds:g} s whether it lives")
        alive = _beats(path, content, dead_after_seconds)
    if alive:
        raise InputError(f"{path.parent}: {_name(owner)} is running here; end it, or use another run_dir")


def is_given_up(owner: dict[str, Any]) -> bool:
    """Whether Slurm has started the owner's job again, as this one: with its node lost, its processes may live on there.

    It commits nothing any more: it checks its lease before.
    """
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return job is not None and owner.get("job") == job and restart > int(owner.get("restart") or 0)


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process is on this machine; None when that can't be known from here.

    A process number means something only under the same boot of the same machine and in the same namespace; the host's name
    alone would not do, as containers on different machines may share it.
    """
    here = _this_process()
    place, pid = ("host", "boot_id", "pid_namespace"), owner.get("pid")
    if not isinstance(pid, int) or any(here[key] is None or owner.get(key) != here[key] for key in place):
        return None
    state = _process_state(pid)
    if state is not None:
        return state[0] not in "ZX" and state[1] == owner.get("pid_start")  # a zombie is dead, a stopped process is not
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return None  # there is such a process, but /proc hides those of other users


def _beats(path: Path, content: bytes, seconds: float) -> bool:
    """Whether the file's owner writes it within `seconds` of looking; False too when it now belongs to another or is gone.

    Time that a look itself takes does not count: a disk that stands still, for us and for the owner, proves nothing.
    """
    for _ in range(LOOKS):
        time.sleep(seconds / LOOKS)
        now = _read(path)
        if now != content:
            return now is not None and _token(now) == _token(content)
    return False


def _replace(path: Path, found: bytes | None, record: dict[str, Any]) -> int | None:
    """Put our lease in the place of what was `found`; a descriptor to write it through, or None if another was faster."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    won = False
    try:
        os.fchmod(descriptor, 0o644)  # mkstemp makes 0600; other users of a cluster read our files
        record["inode"] = os.fstat(descriptor).st_ino
        os.write(descriptor, _content(record, 0))
        os.fsync(descriptor)
        if not (found is None and _link(name, path)) and _read(path) == found:
            if found is not None:
                log(f"{path}: taken over from {_name(_parse(found))}, which is dead or was given up")
            os.replace(name, path)
            # Another newcomer may have looked just before that, and replace ours now. The last one wins: all wait for it.
            time.sleep(SETTLE_SECONDS)
        # Asked in every case: on a network disk a call can succeed and be reported as failed.
        won = _token(_read(path)) == record["token"]
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
        if not won:
            os.close(descriptor)
    return descriptor if won else None


def _link(name: str, path: Path) -> bool:
    """Give a file a second name unless that is in use; False on a disk that has no hard links."""
    try:
        os.link(name, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def _this_process() -> dict[str, Any]:
    """Where a process runs and which it is; values are None where the system does not say."""
    here: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    state = _process_state(os.getpid())
    here["pid_start"] = None if state is None else state[1]
    try:
        here["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    except OSError:
        here["boot_id"] = here["pid_namespace"] = None
    return here


def _process_state(pid: int) -> tuple[str, int] | None:
    """The state's letter and the start, in clock ticks after boot, of a process (proc(5)); None where /proc has none."""
    try:
        # The second field, the program's name in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
