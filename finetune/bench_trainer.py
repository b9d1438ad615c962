"""The other side of `python -m finetune bench`: Hugging Face's Trainer on the exported model code and padded batches.

Needs transformers and accelerate, so nothing but the bench imports it. Nothing is saved, reported or evaluated while it
trains, its rows are tokenized before, and its AdamW is the fused one: what is timed is its loop, its collator, the model.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers import __version__ as transformers_version
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.tasks import Settings
from finetune.tokens import Tokens
from pretrain.hf_modeling import DNABERT2Config, DNABERT2ForSequenceClassification
from pretrain.model import ModelConfig

VERSIONS = {"transformers": transformers_version, "accelerate": importlib.import_module("accelerate").__version__}
Item = dict[str, Any]


def model(config: ModelConfig, classes: int, weights: dict[str, Tensor]) -> Any:
    """The exported code's classifier with our classifier's weights, all of them."""
    made = DNABERT2ForSequenceClassification(DNABERT2Config(**config.model_dump(), num_labels=classes))
    made.load_state_dict(weights)
    return made


def items(tokens: Tokens, targets: NDArray[Any], rows: Iterable[int]) -> list[Item]:
    """Rows as a tokenizer hands them to the Trainer."""
    made = []
    for row in rows:
        first, stop = int(tokens.starts[row]), int(tokens.starts[row + 1])
        item: Item = {"input_ids": tokens.ids[first:stop].tolist(), "labels": targets[row].item()}
        if tokens.seconds is not None:
            item["token_type_ids"] = (np.arange(first, stop) >= tokens.seconds[row]).astype(np.int64).tolist()
        made.append(item)
    return made


class Collator(DataCollatorWithPadding):
    """Pads to the longest sequence of each batch, and counts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
        fast.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # the texts are tokens already
        super().__init__(fast)
        self.counts: list[tuple[int, int]] = []  # tokens without and with padding of each batch

    def __call__(self, features: list[Item]) -> Any:
        batch = super().__call__(features)
        self.counts.append((sum(len(item["input_ids"]) for item in features), batch["input_ids"].numel()))
        return batch


class Turns(TrainerCallback):
    """Stops the clock after every so many steps and lets the other side have its turn, once after the warm-up and so on.

    A turn of the Trainer is from one stop to the next: its loader and collator, the steps, its own bookkeeping.
    """

    def __init__(self, first: int, every: int, now: Callable[[], float], other: Callable[[int], float]) -> None:
        self.first, self.every, self.now, self.other = first, every, now, other
        self.started = 0.0
        self.seconds: list[tuple[float, float]] = []  # of the Trainer and of the other side, a pair a turn

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        beyond = state.global_step - self.first
        if beyond < 0 or beyond % self.every:
            return
        seconds = self.now() - self.started
        other = self.other(self.every if beyond else self.first)
        if beyond:  # the first stop ends the warm-up
            self.seconds.append((seconds, other))
        self.started = self.now()


class InOrder(Trainer):
    """Takes the rows in the order in which they are given: they have been shuffled."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        dataset: Any = self.train_dataset
        return SequentialSampler(dataset)


def trainer(
    made: Any, train_items: list[Item], collator: Collator, turns: Turns, settings: Settings, folder: Path
) -> InOrder:
    """A Trainer that takes every item once with these settings, which writes nothing to stdout."""
    steps = len(train_items) // settings.batch_size
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.gradient_clipping,
        optim="adamw_torch_fused",
        bf16=settings.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # ours takes one
    made_trainer = InOrder(made, arguments, collator, train_items, callbacks=[turns])
    for callback in (PrinterCallback, ProgressCallback):
        made_trainer.remove_callback(callback)
    return made_trainer


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when everything that was asked of the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
