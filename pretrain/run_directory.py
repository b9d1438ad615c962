"""The small files of a run directory: config.yaml, tokenizer.json and exit.json."""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from data_prep.cli import DONE, InputError, dump_json, exit_status, one_line, write_atomically
from data_prep.dataset import Dataset
from data_prep.storage import redacted
from pretrain import checkpoint
from pretrain.config import Config, parse_config, refuse_changes
from pretrain.lease import holder
from pretrain.presets import read_yaml


def check(config: Config, run_dir: Path, dataset: Dataset, from_step: int | None = None) -> None:
    """Raise InputError when the directory holds a run that was started otherwise.

    Every rank looks, so that none waits for one that has left. A run that has committed no step may still change anything,
    one that goes back to an earlier step, `from_step`, its optimizer.
    """
    saved, tokenizer = run_dir / "config.yaml", run_dir / "tokenizer.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: run_dir is not a directory")
    newest = max(checkpoint.steps(run_dir), default=0)
    if saved.is_file() and newest > 0:
        step = newest if from_step is None else from_step
        refuse_changes(config, parse_config(read_yaml(saved), str(saved)), saved, step, going_back=from_step is not None)
    if tokenizer.is_file() and tokenizer.read_bytes() != dataset.tokenizer_path.read_bytes():
        raise InputError(f"{tokenizer}: differs from the tokenizer of {dataset.path}; use another run_dir")


def describe(config: Config, run_dir: Path, dataset: Dataset) -> None:
    """Write the resolved configuration and a copy of the tokenizer: the run explains itself wherever it is copied."""
    write_atomically(run_dir / "tokenizer.json", dataset.tokenizer_path.read_bytes())
    values = config.model_dump(mode="json")
    values["data"]["path"] = redacted(values["data"]["path"])  # everyone may read the file: no password of a URL
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())


def write_exit(run_dir: Path, error: BaseException | None) -> None:
    """Write how this life of the run ended, for scripts: torchrun turns every status but 0 into 1."""
    saved = checkpoint.steps(run_dir)
    record = {
        "status": DONE if error is None else exit_status(error),
        "reason": "done" if error is None else one_line(error) or type(error).__name__,
        "checkpoint_step": saved[-1] if saved else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomically(run_dir / "exit.json", dump_json(record))


def write_exit_instead(run_dir: Path, life: str, rank: int, error: BaseException) -> None:
    """`write_exit` by a rank that outlives rank 0, some seconds later, where no exit.json has come.

    The first ranks come first, so that thousands don't write at once.
    """
    deadline = time.monotonic() + 5 + min(rank, 10)
    while time.monotonic() < deadline:
        if (run_dir / "exit.json").exists():  # the start of the run has removed that of an older life
            return
        time.sleep(0.5)
    if is_ours(run_dir, life):
        write_exit(run_dir, error)


def is_ours(run_dir: Path, life: str) -> bool:
    """Whether no other life has taken the directory over."""
    held = holder(run_dir)
    return held is None or held.get("life") == life
