"""A model opened to be asked, not trained: what `embed`, `attention` and `variants` share.

`open_model` is the one place of theirs where weights are read. Sequences go through the model unpadded, in micro batches of
similar length, so a result does not depend on what else is asked.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.cli import InputError
from data_prep.codec import open_tokenizer
from data_prep.dataset import SPECIALS
from finetune.batches import micro_batches, pack
from finetune.export import read_fine_tuned
from finetune.sequences import Named
from finetune.sources import is_fine_tuned
from finetune.tokens import Encoder, Tokens
from kernels import MAX_SEQUENCE
from pretrain.implementations import choose_alone
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed
from pretrain.pretrained import EMBEDDINGS, TIED, load_pretrained

MASK, UNKNOWN = SPECIALS.index("[MASK]"), SPECIALS.index("[UNK]")
LONGEST = MAX_SEQUENCE - 2  # content tokens of a sequence: [CLS] and [SEP] come to them
HEAD_TOKENS = 4096  # that go through the head at once: each has a number for every token of the vocabulary
Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Opened:
    """A model on its device, in evaluation mode."""

    where: str  # for messages and reports
    config: ModelConfig
    model: MaskedLanguageModel
    tokenizer: Tokenizer
    tokenizer_sha256: str
    encoder: Encoder
    device: torch.device
    bf16: bool
    kernels: dict[str, str]  # what computes each operation

    def encode(self, sequences: Sequence[Named], max_length: int | None = None) -> tuple[list[Ids], int]:
        """Content tokens of each sequence, and how many sequences lost their end because of `max_length`.

        `max_length` counts [CLS] and [SEP]. Raises InputError: a sequence without tokens, or with more than the model takes.
        """
        parts, truncated = self.encoder.split([sequence.text for sequence in sequences]), 0
        limit = LONGEST if max_length is None else min(max_length - 2, LONGEST)
        for number, (part, sequence) in enumerate(zip(parts, sequences, strict=True)):
            if not len(part):
                kmers = f" of {self.encoder.content.k}-mers" if self.encoder.content.k else ""
                raise InputError(
                    f"{sequence.where}: {sequence.text[:20]!r} has no token under the model's tokenizer{kmers}; remove it"
                )
            if len(part) > limit:
                if max_length is None:
                    raise InputError(f"{sequence.where}: {len(part):,} tokens, the model takes {limit:,}; {sequence.remedy}")
                parts[number] = part[:limit]
                truncated += 1
        return parts, truncated

    def token_starts(self, text: str, ids: Ids) -> NDArray[np.int64]:
        """Where in `text` each of its content tokens begins, and where the last one ends [tokens + 1]."""
        if self.encoder.overlapping:
            return np.append(np.arange(len(ids)), len(text))
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if encoding.ids != ids.tolist():
            raise RuntimeError(f"{self.where}: the tokenizer gives other tokens one by one than in bulk")
        return np.array([first for first, _ in encoding.offsets] + [encoding.offsets[-1][1]], dtype=np.int64)

    def states(self, parts: Sequence[Ids]) -> Iterator[tuple[NDArray[np.int64], Packed, Tensor]]:
        """Take sequences of content tokens through the encoder, with [CLS] and [SEP], a micro batch at a time.

        Yields which of `parts` it holds, the micro batch on the device, and the last hidden states [tokens, hidden].
        """
        lengths = np.array([len(part) + 2 for part in parts], dtype=np.int64)
        for rows in micro_batches(lengths):
            batch = self.packed([parts[row] for row in rows])
            with self.precision():
                states_td = self.model.bert(batch)
            yield rows, batch, states_td

    def packed(self, parts: Sequence[Ids]) -> Packed:
        """One micro batch of all `parts`, on the device."""
        starts = np.cumsum([0] + [len(part) + 2 for part in parts])
        edges = (np.array([self.encoder.cls]), np.array([self.encoder.sep]))
        ids = np.concatenate([piece for part in parts for piece in (edges[0], part, edges[1])]).astype(np.int32)
        tokens = Tokens(ids, starts, np.empty(0), 0)
        return pack(tokens, np.arange(len(parts))).to(self.device)

    def log_probabilities(self, states_md: Tensor, labels_m: Tensor) -> Tensor:
        """Of the tokens `labels_m` where these states stand, fp32 [m]; a bounded number of tokens at a time."""
        found = []
        for states, labels in zip(states_md.split(HEAD_TOKENS), labels_m.split(HEAD_TOKENS), strict=True):
            with self.precision():
                logits = self.model.cls.predictions(states)
            found.append(logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0])
        return torch.cat(found)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """bf16 for the matrix products if that was asked for; norms and softmax stay fp32."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield

    def about(self) -> dict[str, Any]:
        """What a result says of the model."""
        dtype = "bf16" if self.bf16 else "fp32"
        return {"model": self.where, "tokenizer_sha256": self.tokenizer_sha256, "dtype": dtype, "kernels": self.kernels}


def open_model(
    path: str | Path,
    *,
    dtype: str = "fp32",
    kernels: str = "auto",
    longest: int = MAX_SEQUENCE,
    predicts_masked: bool = False,
) -> Opened:
    """Open a run directory or a Hugging Face directory, pre-trained or fine-tuned, on a GPU where there is one.

    `longest` sequence in tokens and `kernels` are for `choose_alone`. With `predicts_masked` a fine-tuned model, whose head
    for masked tokens is gone, is refused. Raises InputError.
    """
    if fine_tuned := is_fine_tuned(Path(path)):
        if predicts_masked:
            raise InputError(f"{path}: is fine-tuned and has no head for masked tokens; give the pre-trained model")
        tuned = read_fine_tuned(Path(path))
        config, file = tuned.config, Path(path) / "tokenizer.json"
    else:
        found = load_pretrained(path)
        config, file = found.config, found.tokenizer
    tokenizer = open_tokenizer(file)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise InputError(f"{file}: has a token {largest}, but the model's vocab_size is {config.vocab_size}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MaskedLanguageModel(config)
    if fine_tuned:
        states = tuned.model.bert.state_dict()
        model.bert.load_state_dict({name: value for name, value in states.items() if not name.startswith("pooler.")})
    else:
        model.load_state_dict(found.weights | {TIED: found.weights[EMBEDDINGS]})
    bf16 = dtype == "bf16"
    return Opened(
        where=str(path),
        config=config,
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        tokenizer_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        encoder=Encoder(tokenizer, config.vocab_size),
        device=device,
        bf16=bf16,
        kernels=choose_alone(config, device, torch.bfloat16 if bf16 else torch.float32, longest, kernels),
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model is asked, and how it computes."""
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a run directory of `pretrain train`, or a Hugging Face directory"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrix products (default: fp32)")
    parser.add_argument(
        "--kernels",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="who computes attention, LayerNorm and GEGLU (default: Triton on a GPU where it works)",
    )
