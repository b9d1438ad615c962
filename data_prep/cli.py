"""What every command of the project shares: exit statuses, one-line errors, the last line of JSON, progress.

`data_prep`, `pretrain` and `finetune` have a `__main__.py` that builds an argument parser, gives each verb a function
`(args) -> dict`, and hands both to `main()`. Nothing here imports torch: data preparation runs on cheap CPU nodes.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from tqdm import tqdm

DONE = 0  # the command did what it was asked to
FAILED = 1  # any failure that is not one of the others
BAD_INPUT = 2  # the input or the configuration is wrong: running again cannot help
HUNG = 70  # waited in vain for a file or another rank: running again may help
RUN_AGAIN = 75  # stopped on request after saving: run the same command again
INTERRUPTED = 130  # Ctrl-C, as shells say it

Item = TypeVar("Item")


class InputError(Exception):
    """Bad input or configuration. The message is one line naming the file, record or key, and the remedy."""


BAD_INPUT_ERRORS = (InputError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class Hung(Exception):
    """Something that had to come did not come in time. The message names it."""


class StopRequested(Exception):
    """The run saved its state and left because it was asked to; running it again goes on from there."""


def log(message: str) -> None:
    """Write one line to stderr; stdout is kept for results."""
    print(f"{message}\n", end="", file=sys.stderr, flush=True)  # in one piece: several processes write there


def progress(items: Iterable[Item], *, total: int | None, unit: str, every_seconds: float = 15.0) -> Iterator[Item]:
    """Yield `items`, showing a bar on a terminal and a line every so often elsewhere (logs of batch jobs)."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=unit, dynamic_ncols=True)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            log(f"{done}/{total if total is not None else '?'} {unit} in {last - started:.0f} s")
        yield item


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1, with which Slurm announces the end, into StopRequested. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> NoReturn:
        raise StopRequested(f"{signal.Signals(number).name}: what is done stays done")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in the error of a full disk: a write to a file that is open names none."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, *, sync_directory: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends without an error, and else goes.

    A reader sees the old file or the new one, even across a power cut. Without `sync_directory` the caller has to make the
    new name durable, with others in one go.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as stream, writing(path):
            os.fchmod(stream.fileno(), 0o644)  # mkstemp makes 0600; other users of a cluster read our files
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if sync_directory:
        fsync_directory(path.parent)


def write_atomically(path: Path, data: bytes, *, sync_directory: bool = True) -> None:
    """Replace `path` by a file holding `data`; see `replacing`."""
    with replacing(path, sync_directory=sync_directory) as stream:
        stream.write(data)


def fsync_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def dump_json(value: Any) -> bytes:
    """JSON as it stands in our files: sorted keys, two spaces, a final newline; equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


class IntermixedParser(argparse.ArgumentParser):
    """Takes options before, between and after `key.sub=value` overrides: job scripts add to both ends."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):
        if self._inside:  # parse_known_intermixed_args is made of this
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def main(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Run the verb chosen on the command line and return the exit status.

    Each subparser sets `run` to a function `(args) -> dict`. With `--json` the dict is printed as one JSON object on
    the last line of stdout. Errors are one line on stderr, with a traceback only under `--debug`.
    """
    args = parser.parse_args(argv)
    try:
        result = args.run(args)
        if args.json:
            print(json.dumps(result, sort_keys=True), flush=True)
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        status = exit_status(error)
        if status == RUN_AGAIN:
            log(f"{parser.prog}: {error}; run the same command again to go on")
        elif status == BAD_INPUT:
            log(f"{parser.prog}: error: {one_line(error)}")
        elif status == INTERRUPTED:
            log(f"{parser.prog}: interrupted")
        else:
            log(f"{parser.prog}: failed: {type(error).__name__}: {one_line(error)} (--debug shows where)")
        return status


def leave(status: int) -> NoReturn:
    """End the process at once with this status, its output written.

    For commands that use torch: its threads, or a daemon thread inside it, can abort the interpreter while that is shutting
    down ("terminate called without an active exception"), and the abort would hide the status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_status(error: BaseException) -> int:
    """The exit status that stands for an exception, on the command line and in exit.json."""
    if isinstance(error, StopRequested):
        return RUN_AGAIN
    if isinstance(error, BAD_INPUT_ERRORS):
        return BAD_INPUT
    if isinstance(error, Hung):
        return HUNG
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def one_line(error: BaseException) -> str:
    """The error's message on one line; an OSError as 'path: reason'."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def add_verb(verbs: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    """Add a subparser with the flags that every verb has, bound to `run`."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    verb.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line of stdout")
    verb.add_argument("--debug", action="store_true", help="show a traceback with an error")
    verb.set_defaults(run=run)
    return verb
