"""How much RAM this process has had, and how much it can get."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The most RAM in bytes that this process has had since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(root: Path = Path("/")) -> int | None:
    """RAM in bytes that this process can get: what the machine has left, or its job's limit where that is less.

    A job's limit is that of its control groups (version 1 or 2), as Slurm sets it. None where the system doesn't say.
    """
    amounts = []
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        amounts += [int(found[1]) * 1024] if found else []
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:  # "4:memory:/slurm/job_7", or "0::/slurm/job_7" of version 2
        _, kind, path = group.split(":", 2)
        if kind not in ("", "memory"):
            continue
        base, name = ("sys/fs/cgroup", "memory.max") if not kind else ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        place = root / base / path.lstrip("/")
        for folder in (place, *place.parents):  # each limits all below it
            limit = folder / name
            try:
                amounts.append(int(limit.read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return min(amounts, default=None)
