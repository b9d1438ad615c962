"""What a run tells the world while it trains: metrics.jsonl, TensorBoard and a line on the console."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from data_prep.cli import log, write_atomically

SLOW_RANK = 1.5  # times the median, from where the console names it
WAIT_SECONDS = 0.1  # of an interval, from where the console tells


class Metrics:
    """Written by rank 0. Each step stands once: a resumed run first cuts away what lies beyond the restored step."""

    def __init__(self, run_dir: Path, restored_step: int, max_steps: int) -> None:
        self.path, self.max_steps = run_dir / "metrics.jsonl", max_steps
        kept = [record for record in read_metrics(self.path) if record["step"] <= restored_step]
        write_atomically(self.path, "".join(map(_line, kept)).encode())
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=restored_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Add one step. `record` has `step`, and numbers by name at full precision.

        JSON has no number for what is not finite: it becomes null in metrics.jsonl, and TensorBoard gets no point.
        """
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
        self._file.write(_line(finite))
        self._file.flush()
        for name, value in finite.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])
        log("  ".join(self._shown(record)))

    def _shown(self, record: dict[str, Any]) -> list[str]:
        """The console's part of a record: what one wants to see at a glance, and what is out of the ordinary."""
        known = {name: math.nan if value is None else value for name, value in record.items()}
        shown = [f"step {known['step']}/{self.max_steps}", f"loss {known['loss']:.4f}"]
        if "validation_loss" in known:
            shown.append(f"validation {known['validation_loss']:.4f}")
        shown += [f"accuracy {known['masked_accuracy']:.3f}", f"norm {known['grad_norm']:.3g}"]
        shown.append(f"{known['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in known:
            shown.append(f"mfu {known['mfu']:.1%}")
        if known["data_wait_seconds"] >= WAIT_SECONDS:
            shown.append(f"waited {known['data_wait_seconds']:.1f} s for data")
        if known.get("checkpoint_stall_seconds", 0) >= WAIT_SECONDS:
            shown.append(f"waited {known['checkpoint_stall_seconds']:.1f} s for a checkpoint")
        if known.get("slowest_rank_ratio", 1) > SLOW_RANK:
            shown.append(f"rank {known['slowest_rank']:.0f} takes {known['slowest_rank_ratio']:.1f}x the median")
        for what in ("steps", "sequences"):
            if known.get(f"skipped_{what}"):
                shown.append(f"{known[f'skipped_{what}']:.0f} {what} skipped")
        return shown

    def flush(self) -> None:
        """Called before every checkpoint: what is older than a committed step is not written again."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none where there is no file, and without a last line that isn't finished.

    A line in the middle that is no record, as a power cut can leave it, is left out and named in the log. What follows it is
    kept: every line stands for itself, and steps that are committed are not written again.
    """
    records = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            int(record["step"])
            records.append(record)
        except (ValueError, TypeError, KeyError):
            log(f"{path}: line {number} is damaged and left out")
    return records


def memory_gb(device: torch.device) -> float:
    """The most memory that this process has had so far, in GB (1e9 bytes): the GPU's tensors, or all of it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
