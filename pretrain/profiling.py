"""What a few steps are made of: a torch profiler trace, and how much of their time is communication.

Rank 0 alone is profiled: ranks do the same work, and a trace of each would cost its disk. A collective's time includes the
wait for slower ranks, which is what communication costs a run; `slowest_rank` in the metrics tells the two apart.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from data_prep.cli import dump_json, log, write_atomically

UNPROFILED, WARM_UP = 1, 1  # steps: the first of a life allocates, and the profiler's own start distorts the next
Span = tuple[float, float]


class Profile:
    """Profiles steps of rank 0; does nothing on other ranks.

    Args:
        first_step: the first step of this life. Two steps later the profile begins.
        steps: how many are profiled.
    """

    def __init__(self, run_dir: Path, rank: int, first_step: int, steps: int) -> None:
        self.directory = run_dir / "profile"
        self._first = first_step + UNPROFILED + WARM_UP
        self._last, self._done = self._first + steps - 1, first_step - 1
        self._profiler: Any = None
        if rank != 0:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=UNPROFILED, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def step_done(self, step: int) -> None:
        """To be called after every step; writes the profile after its last one."""
        if self._profiler is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the step has queued belongs to it
        self._done = step
        self._profiler.step()
        if step == self._last:
            self.close()

    def close(self) -> None:
        """To be called when training ends: writes what there is of a profile that isn't complete."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            try:
                profiler.stop()
            except Exception as error:  # a full disk, a cut trace: ends the profile, not the run
                log(f"{self.directory}: the profile can't be written: {error}")

    def _write(self, profiler: Any) -> None:
        """Write the trace and the summary."""
        if self._done < self._first:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"rank-00000-steps-{self._first}-{self._done}.json.gz"
        partial = path.with_name(f".{path.name}")
        profiler.export_chrome_trace(str(partial))
        with gzip.open(partial, "rt") as stream:
            found = summarize(json.load(stream)["traceEvents"])
        partial.rename(path)
        summary = {"first_step": self._first, "last_step": self._done, "trace": path.name, **found}
        write_atomically(self.directory / "summary.json", dump_json(summary))
        exposed = found.get("share_of_exposed_communication")
        log(
            f"profile of steps {self._first} to {self._done}: {found['seconds']:.2f} s, "
            f"{found['share_of_communication']:.1%} of it communication"
            + ("" if exposed is None else f", {exposed:.1%} not hidden behind computation")
            + f"; {path}"
        )


def summarize(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What share of a trace is communication.

    Args:
        events: `traceEvents` of torch's Chrome trace: `ph`, `cat`, `name`, and `ts` and `dur` in microseconds.

    Returns:
        `seconds`, from the start of the first profiled step to the end of the last; `share_of_communication`, the share of
        them in which at least one collective ran: NCCL's kernels on a GPU, gloo's operations on a CPU. On a GPU also
        `share_of_exposed_communication`, in which a collective ran and no other kernel did.
    """
    steps: list[Span] = []
    communication: list[Span] = []
    kernels: list[Span] = []  # those that compute
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name = event.get("cat"), event["name"]
        span = (event["ts"], event["ts"] + event["dur"])
        if category == "user_annotation" and name.startswith("ProfilerStep#"):
            steps.append(span)
        elif category == "kernel":
            (communication if "nccl" in name.lower() else kernels).append(span)
        elif category == "user_annotation" and name.startswith("gloo:"):
            communication.append(span)
    start, end = min(span[0] for span in steps), max(span[1] for span in steps)
    communication, kernels = ([(max(a, start), min(b, end)) for a, b in spans] for spans in (communication, kernels))
    length = end - start
    found = {"seconds": length / 1e6, "share_of_communication": union_length(communication) / length}
    if kernels:
        exposed = union_length(communication + kernels) - union_length(kernels)
        found["share_of_exposed_communication"] = exposed / length
    return found


def union_length(spans: Iterable[Span]) -> float:
    """Length of the union of intervals (start, end); one that ends before it starts counts as empty."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
