"""The hyper-parameters of a run, and what the paper used for each of the 28 GUE tasks, as data.

A task is known by its folder below the benchmark's, such as `tf/0`; one that is not in the table gets the defaults of
`Settings`. Class counts and lengths are never in the table: they are read from the data.

The published maximum lengths are here for reference only. They cut 64 % of the splice sequences, so nothing is
truncated unless the user asks (`--max-length`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.cli import InputError


class Settings(BaseModel):
    """Every number that can change a score, beside the seed, the data and the initial weights.

    The defaults are the paper's (Zhou et al., "DNABERT-2", ICLR 2024, appendix) where it gives them; the moments,
    epsilon and the gradient's largest norm are those of the Hugging Face Trainer that it used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(3e-5, gt=0)  # reached after the warm-up
    batch_size: int = Field(32, ge=1)  # sequences a step
    epochs: int | None = Field(3, ge=1)  # the run ends after these or after max_steps, whichever comes first;
    max_steps: int | None = Field(None, ge=1)  # None: no such limit
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0)  # of matrices; biases and LayerNorms have none
    eval_every: int = Field(200, ge=1)  # steps between evaluations on dev; the last step always has one
    max_length: int | None = Field(None, ge=3)  # tokens with [CLS] and [SEP]; None: nothing is truncated
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the matrix products; weights and optimizer are fp32
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    gradient_clipping: float = Field(1.0, gt=0)  # largest global gradient norm


_EMP = ("H3", "H3K14ac", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H4", "H4ac")
_PROMOTERS: dict[str, dict[str, Any]] = {
    "all": {"epochs": 4, "eval_every": 400},
    "notata": {"epochs": 4, "eval_every": 400},
    "tata": {"epochs": 10},
}

# Where a task differs from the defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"EMP/{mark}": {} for mark in _EMP},
    **{f"prom/prom_core_{kind}": values for kind, values in _PROMOTERS.items()},
    **{f"prom/prom_300_{kind}": values for kind, values in _PROMOTERS.items()},
    "splice/reconstructed": {"epochs": 5},
    **{f"tf/{number}": {"warmup_steps": 30} for number in range(5)},
    **{f"mouse/{number}": {"epochs": None, "max_steps": 1000, "warmup_steps": 30} for number in range(5)},
    "virus/covid": {"epochs": 8, "batch_size": 128},
}

# Tokens at which the published scripts truncate, by the start of the task's name.
PUBLISHED_MAX_LENGTH = {
    "EMP/": 128,
    "prom/prom_core_": 20,
    "prom/prom_300_": 70,
    "splice/": 80,
    "tf/": 30,
    "mouse/": 30,
    "virus/": 256,
}


def task_name(folder: Path) -> str:
    """The folder below its nearest parent called GUE or gue, or its last two parts: `GUE/tf/0` is `tf/0`."""
    parts = Path(os.path.abspath(folder)).parts  # a link keeps the name it was given
    benchmark = [number for number, part in enumerate(parts[:-1]) if part.lower() == "gue"]
    return "/".join(parts[benchmark[-1] + 1 :] if benchmark else parts[1:][-2:])


def settings_for(task: str, **changes: Any) -> Settings:
    """The published settings of a task, with those `changes` that are not None.

    Raises InputError naming the command's flag.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        return Settings(**PUBLISHED.get(task, {}) | given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{flag} {first['input']}: {first['msg']}") from None


def metric_of(task: str) -> str:
    """The metric that the benchmark reports for a task, as a key of `metrics.scores`."""
    return "f1_macro" if task == "virus/covid" else "mcc"
