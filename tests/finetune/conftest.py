"""Tiny tasks and models for the tests of fine-tuning."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data_prep.dataset import SPECIALS
from data_prep.tokenizing.train import train_bpe
from finetune.data import read_task
from finetune.tokens import Tokens, tokenize
from pretrain.model import MaskedLanguageModel, ModelConfig, initialize

Row = tuple[str, int | str]


def write_csv(path: Path, rows: Iterable[Row], header: Iterable[str] = ("sequence", "label")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def planted_rows(count: int, seed: int) -> list[Row]:
    """Random sequences of 20 to 40 bases; class 1 has seven G and C for three A and T, class 0 the reverse."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for number in range(count):
        weights = (3, 7, 7, 3) if number % 2 else (7, 3, 3, 7)
        rows.append(("".join(draw.choices("ACGT", weights, k=draw.randint(20, 40))), number % 2))
    return rows


def write_planted_task(folder: Path, train: int = 600, others: int = 100) -> Path:
    for seed, (split, count) in enumerate((("train", train), ("dev", others), ("test", others))):
        write_csv(folder / f"{split}.csv", planted_rows(count, seed))
    return folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder with a planted signal. Read only."""
    return write_planted_task(tmp_path_factory.mktemp("planted") / "GUE" / "made" / "up")


@pytest.fixture
def small_task(tmp_path: Path) -> Path:
    """A task folder to be damaged by a test."""
    return write_planted_task(tmp_path / "GUE" / "small" / "task", train=16, others=8)


@pytest.fixture(scope="session")
def bases_tokenizer() -> Tokenizer:
    """One token a base: [UNK] [CLS] [SEP] [PAD] [MASK] A C G T = 0 to 8."""
    return train_bpe(["ACGT"], len(SPECIALS) + 4)


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return ModelConfig(vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@pytest.fixture(scope="session")
def planted_tokens(planted: Path, bases_tokenizer: Tokenizer) -> dict[str, Tokens]:
    return {split: tokenize(rows, bases_tokenizer, 9, None) for split, rows in read_task(planted).splits.items()}


@pytest.fixture
def damage(small_task: Path) -> Callable[[str, str], Path]:
    """Replace one file of the small task by a text."""

    def replace(split: str, text: str) -> Path:
        path = small_task / f"{split}.csv"
        path.write_bytes(text.encode())
        return path

    return replace


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig, bases_tokenizer: Tokenizer) -> Path:
    """A Hugging Face directory with a small model, as if pre-trained, whose tokenizer file says to truncate. Read only."""
    folder = tmp_path_factory.mktemp("models") / "my model"
    folder.mkdir()
    model = MaskedLanguageModel(small_config)
    initialize(model, 99, 0.02)
    save_file({name: weight.detach() for name, weight in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(small_config.model_dump_json())
    tokenizer = Tokenizer.from_str(bases_tokenizer.to_str())
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
