"""`python -m tests.drills [NAME ...]`: break runs on purpose, one after the other, and print what became of them."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.commands import ROOT
from tests.drills.check import Outcome, check
from tests.drills.drills import DRILLS
from tests.drills.lab import MAX_STEPS, RANKS, SAVE_EVERY, Lab, Unavailable

RANDOM_KILLS = ("kill_all_ranks_at_random", "kill_one_rank_at_random")


class Line(NamedTuple):
    name: str
    seed: int
    note: str
    outcome: Outcome | None
    verdict: str  # "yes", "NO: why", or "skipped: why"
    seconds: float

    def __str__(self) -> str:
        done = self.outcome
        then = f"at {done.last}, from {done.resumed_from}, {done.redone} redone" if done else ""
        return f"{self.name:28} {self.seed:4}  {self.note:55} {then:26} {self.seconds:4.0f} s  {self.verdict}"


def plan(names: list[str], count: int | None) -> list[str]:
    """Each drill once, then again until there are `count`: two random kills for each of the others."""
    others = [name for name in names if name not in RANDOM_KILLS]
    kills = [name for name in names if name in RANDOM_KILLS]
    again = [name for other in others for name in [*kills, other]] if kills and others else names
    return list(islice([*names, *islice(cycle(again), max((count or 0) - len(names), 0))], count))


def drill(lab: Lab, name: str, seed: int) -> Line:
    started, outcome = time.monotonic(), None
    with lab.run() as run:
        try:
            DRILLS[name](run, Random(f"{name} {seed}"))
            outcome, verdict = check(run), "yes"
        except Unavailable as error:
            verdict = f"skipped: {error}"
        except Exception as error:
            verdict = f"NO: {type(error).__name__}: {error}"
            print(run.log(), file=sys.stderr)
        return Line(name, seed, run.note, outcome, verdict, time.monotonic() - started)


def table(lines: list[Line]) -> Iterator[str]:
    yield "| drill | times | survived | most steps redone | committed steps lost |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(line.name for line in lines):
        mine = [line for line in lines if line.name == name]
        outcomes = [line.outcome for line in mine if line.outcome]
        numbers = [max(o.redone for o in outcomes), max(o.lost for o in outcomes)] if outcomes else ["-", "-"]
        survived = sum(line.verdict == "yes" for line in mine)
        yield f"| {name} | {len(mine)} | {survived} | {numbers[0]} | {numbers[1]} |"


PAGE = """# Fault drills

`{command}` at {commit}.
{system}; {ranks} ranks on a CPU. {survived} of {times} survived, in {minutes:.0f} minutes.

Each drill breaks a run of {max_steps} steps, saved every {save_every}, in a directory of its own (`tests/drills/drills.py`
says how), and starts it again with the same command. It has survived when the run went on from the newest whole checkpoint,
and losses, gradient norms, validation, and the weights and moments at the end equal those of a run that nothing happened to,
bit for bit (`tests/drills/check.py`). Steps redone are those in metrics.jsonl after the one that the run went on from: at
most {save_every}, and up to {save_every} more where a save was under way, which training does not wait for, or the newest
checkpoint was damaged.

{table}

## One by one

Columns: drill, seed, what happened, the step that the run was at, the one that it went on from, steps redone, time, whether
it survived.

```
{lines}
```
"""


def page(lines: list[Line], arguments: list[str], seconds: float) -> str:
    """The Markdown of `--out`."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed")]
    return PAGE.format(
        command=shlex.join(["python", "-m", "tests.drills", *arguments]),
        commit=described.stdout.strip(),
        system=", ".join([f"{platform.system()} {platform.release()}", f"Python {platform.python_version()}", *versions]),
        ranks=RANKS,
        survived=sum(line.verdict == "yes" for line in lines),
        times=len(lines),
        minutes=seconds / 60,
        max_steps=MAX_STEPS,
        save_every=SAVE_EVERY,
        table="\n".join(table(lines)),
        lines="\n".join(map(str, lines)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.drills", description=__doc__, epilog="Drills: " + ", ".join(DRILLS)
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--count", type=int, help="how many, repeated with other seeds (default: each once)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the others count on")
    parser.add_argument("--out", type=Path, help="write the results there, as Markdown")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in DRILLS]:
        parser.error(f"no drills called {', '.join(unknown)}; there are: {', '.join(DRILLS)}")
    started, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="drills-") as directory:
        lab = Lab(Path(directory))
        print(f"the uninterrupted run took {lab.seconds:.1f} s", flush=True)
        for number, name in enumerate(plan(args.names or list(DRILLS), args.count)):
            lines.append(drill(lab, name, args.seed + number))
            print(lines[-1], flush=True)
    print("\n".join(["", *table(lines)]))
    if args.out:
        args.out.write_text(page(lines, sys.argv[1:], time.monotonic() - started))
    return int(any(line.verdict.startswith("NO") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
