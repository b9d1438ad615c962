"""A life of a run for workers that look inside it; see `pretrain.train.train`, which does the same and more."""

from pathlib import Path

from pretrain.config import load_config
from pretrain.distributed import StopSignal, start
from pretrain.loader import open_dataset
from pretrain.train import _Run


def begin(name: str, overrides: list[str]) -> _Run:
    config, dataset = open_dataset(load_config(name, overrides))
    run = _Run(config, Path(config.run_dir), start(), "test", StopSignal(), None)
    run.begin(dataset, None)
    return run
