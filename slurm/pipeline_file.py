"""The YAML file of a pipeline: its sections and keys, read strictly. slurm/pipeline.yaml is an example.

Options of verbs and of sbatch are written as on the command line, without the dashes in front.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml.constructor import ConstructorError

from data_prep.cli import InputError
from finetune.tasks import STRICT_SEEDS, Settings, settings_for

Text = Annotated[str, Field(min_length=1)]
# What `submit` itself says to sbatch, and what would undo it.
TAKEN = (
    "array",
    "chdir",
    "comment",
    "dependency",
    "export",
    "job-name",
    "kill-on-invalid-dep",
    "open-mode",
    "output",
    "parsable",
    "wrap",
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"))

    LISTS: ClassVar[tuple[str, ...]] = ()  # fields of which a value is no single word behind `--name=`

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value == "" else value  # a section of which all is commented out

    def options(self) -> dict[str, str]:
        """The options of the verb that are given."""
        given = self.model_dump(by_alias=True, exclude_none=True, exclude={"array", "file", *self.LISTS})
        return {name: str(value) for name, value in given.items()}


class Tokenizer(Section):
    """Options of `data_prep tokenizer`; or `tokenizer: FILE`, a finished one."""

    file: str | None = None
    kind: str | None = None
    k: int | None = None
    vocab_size: int | None = None
    sample_bases: int | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _finished(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) and value else value

    @model_validator(mode="after")
    def _file_or_options(self) -> Tokenizer:
        if self.file is not None and self.options():
            raise ValueError("a finished tokenizer takes no options")
        return self


class Shard(Section):
    """Options of `data_prep shard`."""

    array: int = Field(1, ge=1)  # jobs that share the work
    sequence_length: int | None = None
    unit_bases: int | None = None
    region_bases: int | None = None
    region_tokens: int | None = None
    valid_fraction: float | None = None
    seed: int | None = None
    streams: int | None = None
    packing: Literal["contiguous", "paper"] | None = None
    strands: Literal["forward", "both"] | None = None
    duplicates: Literal["near", "exact", "none"] | None = None
    processes: int | None = None
    exclude: str | None = None  # an exclusion list, for `finalize`

    def options(self) -> dict[str, str]:
        return {name: value for name, value in super().options().items() if name != "exclude"}


class Pretrain(Section):
    config: Text  # a file, or the name of a preset
    overrides: dict[str, Any] = {}  # dotted keys, or nested as in a preset


class Finetune(Section):
    """Options of `finetune gue`."""

    array: int = Field(1, ge=1)  # jobs that share the work
    seeds: int = Field(3, ge=1)
    tasks: list[str] | None = Field(None, min_length=1)  # such as [tf/0, mouse/1]; None: all
    baselines: list[str] | None = Field(None, min_length=1)  # such as [random, kmer, cnn]
    label: str | None = Field(None, pattern="^[A-Za-z0-9][A-Za-z0-9._+-]*$")  # names a folder
    protocol: Literal["strict", "paper"] | None = None
    method: Literal["full", "lora", "probe"] | None = None
    pooling: Literal["cls", "mean"] | None = None
    best_by: Literal["loss", "score"] | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    eval_every: int | None = None
    patience: int | None = None
    max_length: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    clean: Literal["true", "false"] | None = None
    dtype: Literal["fp32", "bf16"] | None = None
    kernels: Literal["auto", "triton", "torch"] | None = None
    processes: int | None = None
    sequence_columns: list[str] | None = Field(None, min_length=1)
    label_column: str | None = None
    kind: Literal["classification", "regression"] | None = None

    LISTS = ("tasks", "baselines", "sequence_columns", "clean")

    def recorded(self) -> dict[str, str]:
        """All that decides what a run is, to be compared when the pipeline is submitted again."""
        listed = {"sequence-columns": self.sequence_columns and " ".join(self.sequence_columns), "clean": self.clean}
        return self.options() | {name: value for name, value in listed.items() if value}

    def words(self) -> list[str]:
        """The arguments that `options` doesn't have."""
        given = {name: getattr(self, name) for name in self.LISTS[:-1]}
        words = [word for name, values in given.items() if values for word in (f"--{name.replace('_', '-')}", *values)]
        return [*words, "--clean"] if self.clean == "true" else words

    def planned(self) -> dict[str, Any]:
        """What decides which runs there are; see `finetune.suite.plan_runs`."""
        options: dict[str, Any] = self.model_dump(include={"seeds", "label", "method", "pooling"})
        return options | {"names": self.tasks, "baselines": self.baselines or []}

    def check(self, tasks: Iterable[str]) -> None:
        """InputError where a run of one of these tasks would refuse its settings, days later."""
        if self.protocol == "strict" and self.seeds < STRICT_SEEDS:
            raise InputError(f"finetune: seeds is {self.seeds}; the strict protocol has at least {STRICT_SEEDS}")
        changes = self.model_dump(include=set(Settings.model_fields) - {"clean"})
        for task in tasks:
            try:
                settings = settings_for(task, self.protocol or "strict", **changes)
            except InputError as error:
                raise InputError(f"finetune: {error}") from None
            given = self.warmup_steps is not None  # another one is shortened
            if given and settings.max_steps is not None and settings.warmup_steps >= settings.max_steps:
                raise InputError(
                    f"finetune: warmup-steps is {settings.warmup_steps} for {task}, which has only {settings.max_steps} "
                    "steps; give fewer, or a longer run"
                )


class Sbatch(Section):
    """Long options of sbatch for all stages, and for one, where they win; true and false for options without a value."""

    all: dict[str, str] = {}
    tokenizer: dict[str, str] = {}
    shard: dict[str, str] = {}
    finalize: dict[str, str] = {}
    pretrain: dict[str, str] = {}
    finetune: dict[str, str] = {}
    report: dict[str, str] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _options(cls, options: Any) -> Any:
        for name in options if isinstance(options, dict) else ():
            for taken in TAKEN:
                if taken.startswith(name):  # sbatch knows an option by its beginning
                    raise ValueError(f"--{taken} is set by the pipeline itself")
            if name.startswith("-") or not name.replace("-", "").isalnum():
                raise ValueError(f"{name!r} is not a long option of sbatch, written without dashes in front")
        return {} if options == "" else options

    def arguments(self, stage: str) -> list[str]:
        """The words for the command line."""
        options: dict[str, str] = self.all | getattr(self, stage)
        return [
            f"--{name}" if value == "true" else f"--{name}={value}" for name, value in options.items() if value != "false"
        ]


class Pipeline(Section):
    """Paths are relative to the folder of the file."""

    out: Text
    genomes: Text | None = None
    dataset: Text | None = None  # a finished one: then there is no data preparation
    gue: Text | None = None  # None: no fine-tuning
    tokenizer: Tokenizer = Tokenizer()
    shard: Shard = Shard()
    pretrain: Pretrain
    finetune: Finetune = Finetune()
    sbatch: Sbatch = Sbatch()

    @model_validator(mode="after")
    def _fits(self) -> Pipeline:
        given = self.model_fields_set
        if (self.genomes is None) == (self.dataset is None):
            raise ValueError("give either genomes or dataset, a finished one")
        if self.dataset is not None and given & {"tokenizer", "shard"}:
            raise ValueError("a finished dataset needs neither tokenizer nor shard")
        if self.gue is None and "finetune" in given:
            raise ValueError("finetune needs gue, the folder with its tasks")
        return self


class _Loader(yaml.BaseLoader):
    """Values as they are written, because nearly all become words of a command: YAML makes 86400 of 24:00:00."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        keys = [key for key, _ in node.value]
        for number, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:number]]:  # PyYAML takes the last
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return mapping


def read_pipeline(path: Path) -> Pipeline:
    """Read the file; InputError names file, key and the nearest known key."""
    try:
        text = path.read_text()
        tree, values = yaml.load(text, _Loader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping with `out:` and so on; see slurm/pipeline.yaml")
    with suppress(KeyError, TypeError):
        tree["pretrain"]["overrides"] = values["pretrain"]["overrides"] or {}  # here 12 and "12" differ
    try:
        return Pipeline.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: " + "; ".join(_explain(item) for item in error.errors())) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested or dotted keys -> {dotted key: the value as JSON}, which is YAML too and leaves every string as it is."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str, ensure_ascii=False)
    return flat


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(Pipeline), n=1, cutoff=0.5)
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")
    if item["type"] == "missing":
        return f"{key} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys as they are written, sections included."""
    keys = []
    for name, info in section.model_fields.items():
        key = prefix + (info.alias or name)
        keys.append(key)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _keys(info.annotation, f"{key}.")
    return keys
