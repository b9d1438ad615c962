"""A row of the preflight's table: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARN, MISS = "OK", "WARN", "MISS"


@dataclass(frozen=True)
class Check:
    """One row. Only a MISS stops the job.

    Attributes:
        fix: what to do, for all but OK.
        again: a node is at fault, not the input: the job may be queued again, without `bad_nodes`.
    """

    group: str
    name: str
    verdict: str
    found: str
    fix: str = ""
    again: bool = False
    bad_nodes: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        return {key: getattr(self, key) for key in ("group", "name", "verdict", "found", "fix")}


def worst(checks: Iterable[Check]) -> str:
    """The verdict on all of them."""
    verdicts = {check.verdict for check in checks}
    return next((verdict for verdict in (MISS, WARN) if verdict in verdicts), OK)


def table(checks: Sequence[Check]) -> list[str]:
    """Lines for people, in columns; a group's name stands at its first row."""
    names = max((len(check.name) for check in checks), default=0)
    groups = max((len(check.group) for check in checks), default=0)
    lines, group = [], ""
    for check in checks:
        head = "" if check.group == group else check.group
        group = check.group
        start = f"{head:<{groups}}  {check.verdict:<4}  {check.name:<{names}}  "
        lines.append(start + check.found)
        if check.verdict != OK and check.fix:
            lines.append(f"{'fix: ':>{len(start)}}{check.fix}")
    return lines


def listed(items: Iterable[Any], most: int = 8) -> str:
    """`a, b, c and 12 more`."""
    words = [str(item) for item in items]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
