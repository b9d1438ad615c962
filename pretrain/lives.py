"""RUN_DIR/lives.jsonl: one object a life of a run that began to train. Imports no torch: `slurm status` reads it."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

FILE = "lives.jsonl"
KEYS = ("life", "time", "job", "restart", "host", "nodes", "ranks", "from_step")


def record_life(run_dir: Path, life: str, ranks: int, from_step: int) -> None:
    """Append this life, durably; rank 0 calls it. `from_step` is the step that the life goes on from.

    Slurm's job, its nodes and how often it was restarted are read from the environment; null where that does not say.
    """
    restart = os.environ.get("SLURM_RESTART_COUNT")  # from the first restart on
    record = {
        "life": life,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": None if restart is None else int(restart),
        "host": socket.gethostname(),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "ranks": ranks,
        "from_step": from_step,
    }
    with (run_dir / FILE).open("a+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(end - 1, 0))
        torn = stream.read() not in (b"", b"\n")  # a life was killed while it wrote its line
        stream.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lives(run_dir: Path) -> list[dict[str, Any]]:
    """The lives, first to last; none where there is no file. What a line lacks is None in it.

    A line that a kill has torn is left out, as is one without numbers where numbers belong.
    """
    path = run_dir / FILE
    lives = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = dict.fromkeys(KEYS) | json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(record["from_step"], int) and isinstance(record["restart"], int | None):
            lives.append(record)
    return lives
