"""Opens a pre-trained model wherever it lies: a run directory, or a directory of Hugging Face files.

What comes out is the same: a configuration, fp32 weights under the state dict's names, a tokenizer file. Hugging Face
files are taken for data from a stranger: no code that lies in the directory is imported, a pickled file is read with
torch's restricted unpickler, and every key, shape and id that the rest of the project relies on is checked here, once.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.cli import InputError, one_line
from data_prep.dataset import SPECIALS
from pretrain import checkpoint
from pretrain.model import MaskedLanguageModel, ModelConfig

TIED = "cls.predictions.decoder.weight"  # stands in a file beside what it is tied to; a state dict of ours has it once
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")  # only fine-tuned models have one, and it is theirs
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained model, not yet built."""

    config: ModelConfig
    weights: dict[str, Tensor]  # fp32, by the name of `MaskedLanguageModel.named_parameters()`: the tied matrix once
    tokenizer: Path
    source: dict[str, Any]  # for reports: kind "run" or "huggingface", path, and step or file; any JSON


def load_pretrained(path: str | Path, step: int | None = None) -> Pretrained:
    """Open a run directory (its newest checkpoint that verifies, or `step`) or a Hugging Face directory.

    Raises InputError when it is neither, or when something in it is missing, damaged or of another model.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return read_run(path, step)
    if (path / "config.json").is_file():
        return read_huggingface(path)
    what = "neither a run directory (no checkpoints/) nor a Hugging Face directory (no config.json)"
    raise InputError(f"{path}: {what if path.is_dir() else 'not a directory'}")


def read_run(run_dir: Path, step: int | None = None) -> Pretrained:
    """The newest checkpoint of a run that verifies, or that of `step`; see `load_pretrained`."""
    run = open_run(run_dir, step)
    return Pretrained(run.config, run.checkpoint.weights(), run.tokenizer, run.source)


@dataclass(frozen=True)
class Run:
    """A run's checkpoint that was verified and whose tensors have not been read yet; the rest as in `Pretrained`."""

    checkpoint: checkpoint.Checkpoint
    config: ModelConfig
    tokenizer: Path
    source: dict[str, Any]


def open_run(run_dir: Path, step: int | None = None) -> Run:
    """The newest checkpoint of a run that verifies, or that of `step`; see `load_pretrained`."""
    if step is None:
        found = checkpoint.newest(run_dir)
        if found is None:
            raise InputError(f"{run_dir}: has no checkpoint that is whole; train it, or give a run that has one")
    else:
        if step not in checkpoint.steps(run_dir):
            known = ", ".join(map(str, checkpoint.steps(run_dir))) or "none"
            raise InputError(f"{run_dir}: no checkpoint of step {step}; there are: {known}")
        found = checkpoint.Checkpoint(checkpoint.step_path(run_dir, step))
        found.verify()
    config = parse_config(found.manifest["model"], found.path / "MANIFEST.json")
    shapes = {name: parameter["shape"] for name, parameter in found.manifest["parameters"].items()}
    check_names_and_shapes({n: torch.empty(s, device="meta") for n, s in shapes.items()}, config, found.path)
    tokenizer = run_dir / "tokenizer.json"
    check_tokenizer(tokenizer, config)
    source = {"kind": "run", "path": str(run_dir), "step": found.step}
    if "loader" in found.state:  # not after an import
        source["dataset_manifest_sha256"] = found.state["loader"]["manifest_sha256"]
    if "imported" in found.state:
        source["imported"] = found.state["imported"]
    return Run(found, config, tokenizer, source)


def read_huggingface(directory: Path) -> Pretrained:
    """config.json, tokenizer.json and model.safetensors or pytorch_model.bin; see `load_pretrained`.

    `source` says which file, which dtype it held (fp16 and bf16 become fp32) and which keys were dropped (a pooler).
    """
    config = parse_config(read_config(directory / "config.json"), directory / "config.json")
    tokenizer = directory / "tokenizer.json"
    check_tokenizer(tokenizer, config)
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise InputError(f"{directory}: holds no weights; expected {' or '.join(WEIGHT_FILES)}")
    raw = _read_weights(path)
    dropped = sorted(name for name in raw if name in POOLER)
    decoder = raw.get(TIED)
    weights = {name: tensor for name, tensor in raw.items() if name not in POOLER and name != TIED}
    check_names_and_shapes(weights, config, path)
    if decoder is not None and not torch.equal(decoder, weights[EMBEDDINGS]):
        raise InputError(f"{path}: {TIED} differs from {EMBEDDINGS}; in this model the two are one")
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"{path}: {name} is {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds a value that is not a number or not finite")
    source = {
        "kind": "huggingface",
        "path": str(directory),
        "file": path.name,
        "dtype": "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})),
        "dropped": dropped,
    }
    wide = {name: tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
    return Pretrained(config, wide, tokenizer, source)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, the tied matrix once; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MaskedLanguageModel(config).named_parameters()}


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a config.json that make our ModelConfig, all of them, from a file that may have many more."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of keys such as hidden_size")
    missing = [key for key in ModelConfig.model_fields if key not in content]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}; is it the config.json of a DNABERT-2?")
    if content.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"{path}: hidden_act is {content['hidden_act']!r}; this model has the exact 'gelu' only")
    return {key: content[key] for key in ModelConfig.model_fields}


def parse_config(values: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise InputError(f"{path}: {what}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A flat state dict, or InputError; nothing in a pickled file is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file: {one_line(error)}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: it holds more than tensors, which could run code here, or it is damaged; "
            "convert it to safetensors where you trust it"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path}: can't be read as a PyTorch file: {one_line(error)}") from None
    if not isinstance(raw, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in raw.items()):
        raise InputError(f"{path}: expected a state dict, names to tensors")
    return raw


def check_names_and_shapes(weights: dict[str, Tensor], config: ModelConfig, path: Path) -> None:
    expected = expected_shapes(config)
    wrong = {"missing": expected.keys() - weights.keys(), "unexpected": weights.keys() - expected.keys()}
    for what, names in wrong.items():
        if names:
            first, *others = sorted(names)
            raise InputError(f"{path}: {what} key {first}{f' and {len(others)} more' if others else ''}")
    for name, shape in expected.items():
        found = tuple(weights[name].shape)
        if found != shape:
            raise InputError(f"{path}: {name} has shape {list(found)}, by the configuration it is {list(shape)}")


def check_tokenizer(path: Path, config: ModelConfig) -> None:
    """The tokenizer of this model: as many tokens as embeddings, and the special ids that the code counts on."""
    if not path.is_file():
        raise InputError(f"{path}: not found; a model is of no use without its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{path}: not a Hugging Face tokenizer.json: {one_line(error)}") from None
    size = tokenizer.get_vocab_size()
    if size != config.vocab_size:
        raise InputError(f"{path}: has {size} tokens, the model's vocab_size is {config.vocab_size}")
    for number, token in enumerate(SPECIALS):
        if tokenizer.token_to_id(token) != number:
            raise InputError(f"{path}: {token} has id {tokenizer.token_to_id(token)}, expected {number}")
