"""The configuration of a pre-training run: one YAML file, `key.sub=value` overrides, and nothing else.

Unknown keys are errors, with the nearest known key named. Every number that can change a later loss is here or in the
dataset's manifest.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.cli import InputError
from pretrain.model import ModelConfig
from pretrain.presets import read_config

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingConfig(Section):
    """Shares of the species in an epoch, which always has as many sequences as the training split.

    With either key, a species' sequences come at most once in each pass over the species, and passes need not end with
    epochs.
    """

    # A species of n sequences gets a share in proportion to n^(1 / temperature). 1: every sequence once an epoch; more:
    # closer to equal shares.
    temperature: float = Field(1.0, gt=0)
    # Shares by name of a species or category of the manifest, in any unit; a category's is divided by size. None: by size.
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> SamplingConfig:
        if self.weights is not None and self.temperature != 1.0:
            raise ValueError("temperature and weights exclude each other")
        return self


class DataConfig(Section):
    path: str  # a dataset directory, or its URL (http, https, s3, gs)
    tokenizer: str | None = None  # a tokenizer.json that the dataset must have been made with; None: any
    sampling: SamplingConfig = SamplingConfig()
    start_new_epoch: bool = False  # on resume with another dataset, seed or sampling: begin an epoch instead of refusing
    on_damaged_block: Literal["stop", "skip"] = "stop"  # skip: its sequences (or its shard's, without index) are left out
    prefetch_steps: int = Field(4, ge=1)  # how far the loader works ahead
    read_threads: int = Field(4, ge=1)  # blocks that a rank reads at once
    memory_gb: float = Field(8.0, gt=0)  # for open blocks, a rank; with less, blocks are read again and again
    cache_dir: str | None = None  # for blocks of URLs, shared by the ranks of a node; None: in the user's cache directory
    cache_gb: float = Field(20.0, gt=0)
    # A rank that waited so long for data ends the run with status 70. Less than watchdog.step_seconds, which would end it
    # without naming the file.
    stall_seconds: float = Field(900.0, gt=0)
    mask_probability: float = Field(0.15, gt=0, lt=1)  # share of content tokens that are predicted
    replace_by_mask: float = Field(0.8, ge=0, le=1)  # of those: share that becomes [MASK]
    replace_by_random: float = Field(0.1, ge=0, le=1)  # of those: share that becomes a random content token

    @model_validator(mode="after")
    def _shares(self) -> DataConfig:
        if self.replace_by_mask + self.replace_by_random > 1:
            raise ValueError("replace_by_mask + replace_by_random is over 1")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019) with the paper's values as defaults, or LAMB (You et al., 2020).

    Both decay weights by learning_rate * weight_decay a step (LAMB times its trust ratio). If the paper's 1e-5 was meant for
    a *decoupled* AdamW, whose decay is not multiplied by the learning rate, the equal value here is 1e-5 / 5e-4 = 0.02.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    # Who computes AdamW. auto: torch's fused one, which leaves a step out and clips on the device itself, in the same pass;
    # apex's and DeepSpeed's FusedAdam have to be built, and are told by the host (pretrain/optimizer.py).
    implementation: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    learning_rate: float = Field(5e-4, gt=0)  # reached after the warm-up
    # linear: to 0 (the paper's); cosine: to a share of the peak; wsd: stable, then down over the last `decay_steps`
    # (pretrain/schedule.py).
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    warmup_steps: int = Field(30_000, ge=0)
    decay_steps: int = Field(50_000, ge=1)  # of wsd
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)  # of cosine and wsd: the share of the peak that they end at
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    # False: weights of LayerNorms and all biases are not decayed, and LAMB gives them no trust ratio.
    decay_norms_and_biases: bool = True
    gradient_clipping: float = Field(0.0, ge=0)  # largest global gradient norm; 0: none (the paper names none)

    @model_validator(mode="after")
    def _means_something(self) -> OptimizerConfig:
        if self.name == "lamb" and self.implementation != "auto":
            raise ValueError("implementation says who computes AdamW; with name lamb it must be auto")
        if self.schedule == "linear" and self.final_learning_rate_ratio:
            raise ValueError("final_learning_rate_ratio belongs to the schedules cosine and wsd; linear goes to 0")
        return self


class BatchWarmupConfig(Section):
    """Steps with fewer sequences at the beginning: from `start` linearly to `train.global_batch_size` after `steps`."""

    start: int = Field(ge=1)  # sequences of the first step
    steps: int = Field(ge=1)  # the first step with all of them is the one after so many


class TrainConfig(Section):
    max_steps: int = Field(500_000, ge=1)  # the schedule ends here
    stop_at_step: int | None = Field(None, ge=0)  # save and leave here; the schedule still ends at max_steps
    global_batch_size: int = Field(4096, ge=1)  # sequences a step over all ranks
    batch_warmup: BatchWarmupConfig | None = None
    micro_batch_size: int = Field(64, ge=1)  # sequences a rank takes through the model at once
    # Memory for time: each layer keeps its input only and is computed again in the backward pass, a third more products.
    activation_checkpointing: bool = False
    recompute_geglu: bool = False  # the GEGLU is computed again: f values a token and layer less, no more products
    # torch.compile around the layers, after a trial at the start; where that fails the run doesn't start. It takes half a
    # minute and more, and is not for ZeRO stage 3 (pretrain/compiled.py).
    compile: bool = False
    # On a CPU, fp32 products by oneDNN instead of torch's BLAS, after a trial: faster on some CPUs (pretrain/onednn.py).
    onednn: bool = False
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"
    log_every: int = Field(10, ge=1)  # steps
    # Dense matrix TFLOP/s of a device in `dtype`, for `mfu` in the metrics; None: known for common GPUs (pretrain/flops.py).
    peak_tflops: float | None = Field(None, gt=0)


class BadStepsConfig(Section):
    """Steps whose update is not made, on any rank: the loss or a gradient is not finite, or the gradient norm is a spike."""

    # A norm over so many times the median of the last `window` good ones is a spike; 0: none ever is.
    norm_factor: float = Field(10.0, ge=0)
    window: int = Field(128, ge=1)  # there are no spikes until it is full
    stop_after: int = Field(10, ge=1)  # so many bad steps in a row end the run with status 1


Implementation = Literal["auto", "triton", "torch"]


class KernelsConfig(Section):
    """Who computes the fused operations; all draw the same dropout.

    auto: on a GPU Triton's kernels where they run and agree with PyTorch, tried at the start, else PyTorch's; on a CPU
    PyTorch's. One that is named and can't run is an error.
    """

    attention: Implementation = "auto"
    layer_norm: Literal["auto", "triton", "apex", "torch"] = "auto"
    geglu: Implementation = "auto"
    cross_entropy: Implementation = "auto"
    dropout: Implementation = "auto"


class ValidationConfig(Section):
    every: int = Field(1000, ge=0)  # steps; 0: never
    sequences: int = Field(4096, ge=1)  # how many, spread evenly over the validation split


class CheckpointConfig(Section):
    save_every: int = Field(1000, ge=1)  # steps; the last step is always saved
    keep_last: int = Field(3, ge=1)
    keep_every: int = Field(0, ge=0)  # the first step at or after each multiple of it is kept for good; 0: none


class WatchdogConfig(Section):
    """How long a rank may take before it writes down what all its threads do and ends with status 70."""

    start_seconds: float = Field(3600.0, gt=0)  # from the start of the process to the end of its first step
    step_seconds: float = Field(1200.0, gt=0)  # a step, data included, or a batch of validation
    save_seconds: float = Field(3600.0, gt=0)  # writing a checkpoint: only where training has to wait for it


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1


class Config(Section):
    run_dir: str
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    bad_steps: BadStepsConfig = BadStepsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    kernels: KernelsConfig = KernelsConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        optimizer, train = self.optimizer, self.train
        if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_steps > train.max_steps:
            raise ValueError("optimizer.warmup_steps + optimizer.decay_steps is over train.max_steps")
        if train.batch_warmup is not None and train.batch_warmup.start > train.global_batch_size:
            raise ValueError("train.batch_warmup.start is over train.global_batch_size")
        if self.train.dtype != "fp32" and self.deepspeed.zero_stage == 0:
            raise ValueError(
                "deepspeed.zero_stage 0 needs train.dtype=fp32: in bf16 it has no fp32 master weights; use stage 1"
            )
        if train.compile and self.deepspeed.zero_stage == 3:
            raise ValueError("train.compile can't be had at deepspeed.zero_stage 3, which gathers weights inside the layers")
        if train.onednn and train.dtype != "fp32":
            raise ValueError("train.onednn is for train.dtype=fp32; torch takes bf16 products from oneDNN by itself")
        if train.onednn and train.recompute_geglu:
            raise ValueError("train.onednn with train.recompute_geglu would compute a product of each layer twice; take one")
        if self.data.stall_seconds >= self.watchdog.step_seconds:
            raise ValueError("data.stall_seconds must be less than watchdog.step_seconds")
        return self


# On resume these may differ from the run's config.yaml; any other difference would change what the run means.
MAY_CHANGE = frozenset(
    {
        "run_dir",
        "data.path",  # the manifest's sum in the checkpoint says whether it is the same dataset
        "data.tokenizer",
        "data.start_new_epoch",
        "data.on_damaged_block",
        "data.prefetch_steps",
        "data.read_threads",
        "data.memory_gb",
        "data.cache_dir",
        "data.cache_gb",
        "data.stall_seconds",
        "train.stop_at_step",
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "train.recompute_geglu",
        "train.compile",
        "train.onednn",
        "train.log_every",
        "train.peak_tflops",
        "optimizer.implementation",
        "validation.every",
        "validation.sequences",
        "checkpoint.save_every",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "bad_steps.stop_after",
        "watchdog.start_seconds",
        "watchdog.step_seconds",
        "watchdog.save_seconds",
        "kernels.attention",
        "kernels.layer_norm",
        "kernels.geglu",
        "kernels.cross_entropy",
        "kernels.dropout",
        "deepspeed.zero_stage",
    }
)

# These too when `data.start_new_epoch` is set; the loader's state in the checkpoint says whether a new epoch has to begin.
NEW_EPOCH_MAY_CHANGE = ("train.seed", "data.sampling.")
# And these with --from-step, which is how one leaves a run that has diverged.
GOING_BACK_MAY_CHANGE = ("optimizer.", "bad_steps.")
# And these while a schedule `wsd` has not begun to fall, before and after the change: the steps so far are the same.
STABLE_PHASE_MAY_CHANGE = ("train.max_steps", "optimizer.decay_steps", "optimizer.final_learning_rate_ratio")


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a preset (`pretrain/presets.py`), and apply overrides such as `train.max_steps=100`.

    Raises InputError naming file and key.
    """
    file, tree = read_config(path)
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(file))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Check a nested mapping; InputError names `source`, the dotted key and what is wrong with it."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r}: an override is written key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{override!r}: the value is not YAML") from None
    if isinstance(value, str):
        value = _number(value)
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"{override!r}: {parent} is not a section")
        node = child
    node[last] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads 5e-4 as a string (it wants 5.0e-4); people write 5e-4."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(Config), n=1, cutoff=0.5)
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")
    if item["type"] == "missing":
        return f"{key} is missing; give it in the file or as {key}=..."
    return f"{key}: {item['msg']}" if key else str(item["msg"])


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys, sections included."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {dotted key: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def refuse_changes(config: Config, saved: Config, source: Path, step: int, going_back: bool) -> None:
    """Raise InputError when a resumed run's configuration differs in a key that would change what the run means.

    Args:
        config: how it is to go on, `saved` how it was.
        step: where it goes on.
    """
    new, old = flatten(config.model_dump(mode="json")), flatten(saved.model_dump(mode="json"))
    changed = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key) and key not in MAY_CHANGE)
    if config.data.start_new_epoch:
        changed = [key for key in changed if not key.startswith(NEW_EPOCH_MAY_CHANGE)]
    if going_back:
        changed = [key for key in changed if not key.startswith(GOING_BACK_MAY_CHANGE)]
    if all(each.optimizer.schedule == "wsd" and step <= _first_of_decay(each) for each in (config, saved)):
        changed = [key for key in changed if key not in STABLE_PHASE_MAY_CHANGE]
    if changed:
        lines = ", ".join(f"{key} is {new.get(key)!r}, was {old.get(key)!r}" for key in changed)
        new_order = all(key.startswith(NEW_EPOCH_MAY_CHANGE) for key in changed)
        hint = ", or data.start_new_epoch=true to go on with a new epoch" if new_order else ""
        if saved.optimizer.schedule == "wsd" and set(changed) <= set(STABLE_PHASE_MAY_CHANGE):
            before = min(_first_of_decay(config), _first_of_decay(saved))
            hint = f", or --from-step with a step up to {before}, where the learning rate has not begun to fall"
        raise InputError(f"{source}: this run was started with another configuration: {lines}; use another run_dir{hint}")


def _first_of_decay(config: Config) -> int:
    return config.train.max_steps - config.optimizer.decay_steps
