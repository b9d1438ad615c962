"""The datasets of GUE and GUE+, the hyper-parameters of a run, and the two protocols, as data.

`paper` does what the published scripts do: the model of the lowest dev loss, and maximum lengths that cut 64 % of the splice
sequences. `strict` is ours: nothing is truncated, the model of the best dev score. The batch is that of one process on one
device under both, so that it doesn't depend on the number of GPUs. Class counts and lengths are never in the table: they are
read from the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.cli import InputError

Protocol = Literal["strict", "paper"]
Method = Literal["full", "lora", "probe", "kmer", "cnn"]
Pooling = Literal["cls", "mean"]
STRICT_SEEDS = 3  # a table of fewer seeds is not one of the strict protocol


class Settings(BaseModel):
    """Every number that can change a score, beside the seed, the data and the initial weights.

    The defaults are the paper's (Zhou et al., "DNABERT-2", ICLR 2024, appendix) where it gives them; the moments,
    epsilon and the gradient's largest norm are those of the Hugging Face Trainer that it used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Method = "full"  # what is trained: all weights, low-rank updates, a linear probe; or a baseline without encoder
    pooling: Pooling = "cls"  # tokens to one vector: the first one, or the mean of all
    learning_rate: float = Field(3e-5, gt=0)  # reached after the warm-up
    batch_size: int = Field(32, ge=1)  # sequences a step
    epochs: int | None = Field(3, ge=1)  # the run ends after these or after max_steps, whichever comes first;
    max_steps: int | None = Field(None, ge=1)  # None: no such limit
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0)  # of matrices; biases and LayerNorms have none
    eval_every: int = Field(200, ge=1)  # steps between evaluations on dev; the last step always has one
    best_by: Literal["loss", "score"] = "score"  # which evaluation's weights are kept; score: MCC, or Pearson's correlation
    patience: int | None = Field(None, ge=1)  # stop after so many evaluations without a better one; None: never
    max_length: int | None = Field(None, ge=4)  # tokens with [CLS] and [SEP]; None: nothing is truncated
    clean: bool = False  # dev rows whose sequence is in train are left out
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the matrix products; weights and optimizer are fp32
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    gradient_clipping: float = Field(1.0, gt=0)  # largest global gradient norm
    lora_rank: int = Field(8, ge=1)  # this and the next two: the paper's for the Nucleotide Transformers
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)


_EMP = ("H3", "H3K14ac", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H4", "H4ac")
_EPI = ("GM12878", "HUVEC", "HeLa-S3", "IMR90", "K562", "NHEK")
_PROMOTERS: dict[str, dict[str, Any]] = {
    "all": {"epochs": 4, "eval_every": 400},
    "notata": {"epochs": 4, "eval_every": 400},
    "tata": {"epochs": 10},
}

# Where a task of the benchmark differs from the defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"EMP/{mark}": {} for mark in _EMP},
    **{f"prom/prom_core_{kind}": values for kind, values in _PROMOTERS.items()},
    **{f"prom/prom_300_{kind}": values for kind, values in _PROMOTERS.items()},
    "splice/reconstructed": {"epochs": 5},
    **{f"tf/{number}": {"warmup_steps": 30} for number in range(5)},
    **{f"mouse/{number}": {"epochs": None, "max_steps": 1000, "warmup_steps": 30} for number in range(5)},
    "virus/covid": {"epochs": 8, "batch_size": 128},
    # GUE+. The last two names contradict the paper's class counts and lengths, which are read from the data.
    **{f"EPI/{line}": {"learning_rate": 2e-5} for line in _EPI},
    "fungi_species_20": {"learning_rate": 2e-5},
    "virus_species_40": {"learning_rate": 2e-5},
}

# The paper's groups of GUE's tasks, as the means of its tables have them.
GROUPS: dict[str, tuple[str, ...]] = {
    "EMP": tuple(f"EMP/{mark}" for mark in _EMP),
    "PD": tuple(f"prom/prom_300_{kind}" for kind in _PROMOTERS),
    "TF-H": tuple(f"tf/{number}" for number in range(5)),
    "CPD": tuple(f"prom/prom_core_{kind}" for kind in _PROMOTERS),
    "TF-M": tuple(f"mouse/{number}" for number in range(5)),
    "CVC": ("virus/covid",),
    "SSD": ("splice/reconstructed",),
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

# Where a method differs, for all tasks: LoRA's rate is the paper's, the convolutional network starts from nothing.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"learning_rate": 1e-4},
    "probe": {"pooling": "mean"},
    "kmer": {},
    "cnn": {"learning_rate": 1e-3},
}


def published_max_length(task: str) -> int | None:
    """Where the published scripts truncate this task; None where they are silent."""
    return next((length for start, length in PUBLISHED_MAX_LENGTH.items() if task.startswith(start)), None)


def settings_for(task: str, protocol: Protocol = "strict", **changes: Any) -> Settings:
    """The settings of a task under a protocol, with those `changes` that are not None.

    Raises InputError naming the command's flag.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    ours: Mapping[str, Any] = {}
    if protocol == "paper":
        ours = {"best_by": "loss", "max_length": published_max_length(task)}
    method = METHODS.get(str(given.get("method", "full")), {})
    try:
        return Settings(**{**PUBLISHED.get(task, {}), **ours, **method, **given})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{flag} {first['input']}: {first['msg']}") from None


def metric_of(task: str, kind: str = "classification") -> str:
    """The metric that a table shows for a task, as a key of `metrics.scores`."""
    if kind == "regression":
        return "pearson"
    return "f1_macro" if task == "virus/covid" else "mcc"
