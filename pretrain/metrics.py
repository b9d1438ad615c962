"""What a run tells the world while it trains: metrics.jsonl, TensorBoard and a line on the console."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_prep.cli import log, write_atomically


class Metrics:
    """Written by rank 0. Each step stands once: a resumed run first cuts away what lies beyond the restored step."""

    def __init__(self, run_dir: Path, restored_step: int, max_steps: int) -> None:
        self.path, self.max_steps = run_dir / "metrics.jsonl", max_steps
        write_atomically(self.path, "".join(_lines_up_to(self.path, restored_step)).encode())
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=restored_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Add one step. `record` has `step`, and numbers by name at full precision."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, record["step"])
        shown = [f"step {record['step']}/{self.max_steps}", f"loss {record['loss']:.4f}"]
        if "validation_loss" in record:
            shown.append(f"validation {record['validation_loss']:.4f}")
        shown += [f"accuracy {record['masked_accuracy']:.3f}", f"norm {record['grad_norm']:.3g}"]
        shown.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if record["data_wait_seconds"] >= 0.1:
            shown.append(f"waited {record['data_wait_seconds']:.1f} s for data")
        if "skipped_sequences" in record:
            shown.append(f"{record['skipped_sequences']:.0f} sequences skipped")
        log("  ".join(shown))

    def flush(self) -> None:
        """Called before every checkpoint: what is older than a committed step is not written again."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of steps up to `step`; a kill may have left the last line unfinished."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
