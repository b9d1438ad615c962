"""A dataset whose manifest is not there yet, read like a finished one: `audit` looks at it before `finalize` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import SHARD_ROW, SPLITS, Dataset, Split
from data_prep.plan import load_plan, work
from data_prep.shard import read_marker, shard_rows
from data_prep.storage import LocalStorage


class Unfinished:
    """What the units that are done hold. `manifest` has the parameters and the species table of the plan only."""

    def __init__(self, path: Path) -> None:
        self.path, plan = path, load_plan(path)
        self.manifest: dict[str, Any] = {**plan.parameters, "species": plan.species}
        self.tokenizer_path, self.contigs_path = work(path) / "tokenizer.json", work(path) / "contigs.tsv"
        markers = [marker for unit in plan.units if (marker := read_marker(path, unit)) is not None]
        self.units, self.units_planned = len(markers), len(plan.units)
        rows = [shard_rows(marker) for marker in markers]
        self._splits = {name: split_of_rows(path, name, [row[name] for row in rows if name in row]) for name in SPLITS}

    def split(self, name: str) -> Split:
        """`train` or `valid`."""
        return self._splits[name]


def split_of_rows(dataset: Path, name: str, rows: list[np.void]) -> Split:
    """A split that has only these rows of its table."""
    return Split(LocalStorage(dataset), name, np.array(rows, dtype=SHARD_ROW))


def open_dataset(path: Path) -> Dataset | Unfinished:
    """The dataset in a directory, finished or not."""
    return Unfinished(path) if work(path).is_dir() and not (path / "manifest.json").is_file() else Dataset(path)
