"""Where a run's architecture, tokenizer and first weights come from: a checkpoint, or nothing but a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.cli import InputError, log
from data_prep.codec import open_tokenizer
from data_prep.tokenizing.train import train_bpe
from finetune.results import BASELINES, RANDOM
from pretrain.model import ModelConfig
from pretrain.presets import PRESETS

CLASSIFIER = "DNABERT2ForSequenceClassification"
MINIMUM_OCCURRENCES = 5  # of a merge in the training sequences: an embedding that is seen less learns nothing


@dataclass(frozen=True)
class Source:
    """A model before fine-tuning."""

    where: str  # for messages
    config: ModelConfig
    tokenizer: Tokenizer
    tokenizer_json: bytes  # the file's
    weights: dict[str, Tensor] | None  # None: drawn from the run's seed
    about: dict[str, Any]  # what a results file says of it

    @property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer_json).hexdigest()


def is_fine_tuned(directory: Path) -> bool:
    """Whether a Hugging Face directory has a classifier; False for whatever can't be read."""
    try:
        return CLASSIFIER in json.loads((directory / "config.json").read_bytes()).get("architectures", [])
    except (OSError, ValueError, AttributeError):
        return False


def check_model(model: str) -> None:
    """InputError where this can't be a model to start from; its weights are not looked at."""
    path = Path(model)
    if model in (RANDOM, *BASELINES):
        return
    if is_fine_tuned(path):
        raise InputError(f"{path}: is fine-tuned already; give the pre-trained model that it was made of")
    if not (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
        what = "neither a run directory (no checkpoints/) nor a Hugging Face directory (no config.json)"
        raise InputError(f"{path}: {what if path.is_dir() else 'not a directory'}")


def open_source(model: str, like: str | None, train_sequences: Iterable[str]) -> Source:
    """Open `--model` (a run directory, a Hugging Face directory or `random`) and `--like`.

    `random` with `like` has the architecture and the tokenizer of that model; alone, those of the `tiny` preset and a
    BPE trained on the task's own training sequences. Raises InputError.
    """
    if like is not None and model != RANDOM:
        raise InputError("--like goes with --model random: it says which architecture and tokenizer the random weights get")
    if model == RANDOM and like is None:
        return _tiny(train_sequences)
    from pretrain.pretrained import load_pretrained

    path = Path(model if like is None else like)
    check_model(str(path))
    found = load_pretrained(path)
    return Source(
        where=str(path),
        config=found.config,
        tokenizer=open_tokenizer(found.tokenizer),
        tokenizer_json=found.tokenizer.read_bytes(),
        weights=found.weights if like is None else None,
        about={"kind": "pretrained" if like is None else RANDOM, "path": str(path), "source": found.source},
    )


def _tiny(train_sequences: Iterable[str]) -> Source:
    preset = PRESETS / "tiny.yaml"
    config = ModelConfig.model_validate(yaml.safe_load(preset.read_text())["model"])
    log(f"training a BPE of up to {config.vocab_size} tokens on the task's own training sequences")
    tokenizer = train_bpe(train_sequences, config.vocab_size, MINIMUM_OCCURRENCES)
    config = config.model_copy(update={"vocab_size": tokenizer.get_vocab_size()})
    return Source(
        where=RANDOM,
        config=config,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer.to_str().encode(),
        weights=None,
        about={"kind": RANDOM, "path": None, "source": {"architecture": preset.stem, "tokenizer": "BPE of train.csv"}},
    )
