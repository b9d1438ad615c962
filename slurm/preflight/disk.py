"""The run directory as a preflight sees it: one directory for all nodes, with room for the whole run."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.cli import one_line
from pretrain import checkpoint
from pretrain.lease import holder, is_alive, is_given_up
from slurm.preflight.roll import Roll

TOKEN = ".preflight-"
SEE_SECONDS = 10.0  # for a file of one node to be seen by the others
POLL_SECONDS = 0.1
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def existing(path: Path) -> Path:
    """The directory itself, or the closest one above it that there is."""
    return next(each for each in (path, *path.absolute().parents) if each.is_dir())


def see(roll: Roll, run_dir: Path) -> dict[str, Any]:
    """Rank 0 writes a file into the run directory, others look for it: {"seen": bool, "writable": bool}.

    The file has a new name each time, as network disks remember for a while that a file was not there.
    """
    if roll.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=run_dir, prefix=TOKEN)
            os.write(descriptor, secrets.token_bytes(16))
            os.fsync(descriptor)
            os.close(descriptor)
        except OSError:
            roll.store.set("token", "")  # nobody has to look for it
            raise
        roll.store.set("token", Path(name).name)
        return {"seen": True, "writable": True}
    deadline = time.monotonic() + SEE_SECONDS
    while time.monotonic() < deadline:
        token = roll.store.get("token").decode() if roll.store.check(["token"]) else None
        if token == "" or (token and (run_dir / token).is_file()):
            return {"seen": True, "writable": token == "" or os.access(run_dir, os.W_OK)}
        time.sleep(POLL_SECONDS)
    return {"seen": False, "writable": os.access(run_dir, os.W_OK)}


def forget(roll: Roll, run_dir: Path) -> None:
    """Remove what `see` has left; rank 0, when all have looked."""
    if roll.store.check(["token"]) and (token := roll.store.get("token").decode()):
        with suppress(OSError):
            (run_dir / token).unlink()


def room(run_dir: Path, needed: int) -> dict[str, Any]:
    """Whether the bytes that a run still needs are there, and may be used.

    Checkpoints that have been committed count as there; those of dead lives are removed at the start. The bytes are really
    reserved for a moment (fallocate(2), in a file without a name, which is gone whatever happens), because nothing else
    meets every kind of quota.

    Returns:
        bytes `needed` still and `free`; `inodes` free or None; `reserved`: True, None when not tried or not possible here
        (`why`), False when refused (`why`); `runs`: who holds the directory at this moment, or None.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    needed = max(0, needed - _saved_bytes(run_dir))
    disk = os.statvfs(run_dir)
    facts: dict[str, Any] = {
        "needed": needed,
        "free": disk.f_bavail * disk.f_frsize,
        "inodes": disk.f_favail if disk.f_files else None,
        "reserved": None,
        "why": "",
        "runs": None,
    }
    lease = holder(run_dir)
    alive = False if lease is None or is_given_up(lease) else is_alive(lease)
    if lease is not None and alive and lease.get("inode") == (run_dir / "lease.json").stat().st_ino:
        facts["runs"] = f"life {lease.get('life')} on host {lease.get('host')}, pid {lease.get('pid')}"
    if alive is None:
        # A save of a life that is not dead after all must not meet a disk that is full of nothing.
        facts["why"] = "lease.json says that a run may be here, on another host"
    elif facts["runs"] is None and needed <= facts["free"]:
        facts["reserved"], facts["why"] = _reserve(run_dir, needed)
    return facts


def _saved_bytes(run_dir: Path) -> int:
    steps = [checkpoint.step_path(run_dir, step) for step in checkpoint.steps(run_dir)]
    steps += (run_dir / "checkpoints").glob(f"{checkpoint.PREFIX}*{checkpoint.TEMPORARY}*")
    return sum(file.stat().st_size for step in steps for file in step.iterdir())


def _reserve(directory: Path, size: int) -> tuple[bool | None, str]:
    """Take `size` bytes and give them back: True; False where the disk refuses, None where it can't reserve; and why.

    The system call itself: where a disk can't, posix_fallocate would write every block.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        arguments = ctypes.c_int(file.fileno()), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(max(size, 1))
        if libc.fallocate(*arguments) == 0:
            return True, ""
        number = ctypes.get_errno()
    return (None if number in CANNOT_RESERVE else False), one_line(OSError(number, os.strerror(number), str(directory)))
