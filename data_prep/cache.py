"""A directory of bounded size for what was read from URLs, shared by the processes of a node. Imports no torch.

    <directory>/files/<sha256 of the file>                          tokenizer and tables: whole files, used by their path
    <directory>/blocks/<two hex digits>/<sha256 of a tar>-<offset>  blocks of shards
    <directory>/blocks/<two hex digits>/<sha256 of the file>        indices of shards

Names are those of contents, so nothing in it is ever out of date, and what is found is checked like what is fetched.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.cli import log, one_line

ABANDONED = 3600.0  # seconds after which a temporary file's writer is taken to be dead
PAUSE = 60.0  # seconds without another look when one found no room


@dataclass(frozen=True)
class Cache:
    """Where to keep what was read from URLs, and how many bytes at most.

    The blocks and indices least recently used go first; tokenizer and tables are counted too but stay. Each process looks
    at the directory only now and then, so that of several processes each may pass the limit by a twentieth for a while.
    """

    directory: Path
    limit_bytes: int


def default_directory() -> Path:
    """$XDG_CACHE_HOME/dnabert2-datasets, or ~/.cache/...; on a cluster a node's own disk is the better place."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dnabert2-datasets"


class BlockCache:
    """The blocks and indices of a cache directory. Other processes may write and remove there at any time."""

    def __init__(self, cache: Cache) -> None:
        self._directory, self._limit = cache.directory, cache.limit_bytes
        self._lock = threading.Lock()
        self._used, self._written = self._limit, 0  # bytes there, at a guess; bytes of ours since the last look
        self._next_look = 0.0  # not before this time of the monotonic clock
        self._complained = False

    def get(self, path: Path, problem: Callable[[bytes], str | None]) -> bytes | None:
        """The cached bytes, or None; those with a `problem` are removed."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        damaged = problem(data)
        with suppress(OSError):
            path.unlink() if damaged else os.utime(path)
        return None if damaged else data

    def put(self, path: Path, data: bytes) -> None:
        """Keep the bytes, if they fit. A cache that can't be written costs time, never the run."""
        size = len(data)
        try:
            with self._lock:
                if self._used + size > self._limit or self._written + size > self._limit // 20:
                    if time.monotonic() < self._next_look:
                        return
                    try:
                        self._look(size)
                    finally:
                        full = self._used + size > self._limit
                        self._next_look = time.monotonic() + PAUSE if full else 0.0
                    if full:
                        return
                self._used += size
                self._written += size
            store(path, data)
        except OSError as error:
            if not self._complained:
                log(f"{one_line(error)}; going on without keeping what is read (said once)")
            self._complained = True

    def _look(self, room: int) -> None:
        """Count what is there; if `room` bytes more don't fit, remove the oldest blocks until a tenth is free."""
        self._used = self._written = 0
        blocks: list[tuple[int, int, Path]] = []
        for pattern in ("files/*", "blocks/*/*"):
            for path in self._directory.glob(pattern):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if not path.name.startswith("."):
                        self._used += status.st_size
                        if pattern != "files/*":
                            blocks.append((status.st_mtime_ns, status.st_size, path))
                    elif status.st_mtime < time.time() - ABANDONED:
                        path.unlink()
        if self._used + room > self._limit:
            for _, size, path in sorted(blocks):
                if self._used + room <= 0.9 * self._limit:
                    break
                path.unlink(missing_ok=True)
                self._used -= size


def store(path: Path, data: bytes) -> None:
    """Replace `path`. Without fsync, unlike write_atomically: what a crash damages is found by its sum and fetched anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def damage(data: bytes, size: int, crc32: int) -> str | None:
    """What is wrong with the bytes, if anything."""
    if len(data) != size:
        return f"{len(data)} of {size} bytes"
    return None if zlib.crc32(data) == crc32 else "crc32 differs"
