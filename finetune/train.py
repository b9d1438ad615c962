"""One fine-tuning: AdamW over shuffled batches, dev after every so many steps, the best weights kept.

A single process on one device. The learning rate rises linearly from 0 over the warm-up and falls linearly to 0 at the
end (`get_linear_schedule_with_warmup` of Hugging Face, which the published scripts used: the first step's rate is 0).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_prep.cli import InputError, log, progress
from finetune.batches import epoch_order, micro_batches, pack
from finetune.data import Tokens
from finetune.metrics import cross_entropy, scores
from finetune.model import Classifier
from finetune.tasks import Settings


@dataclass(frozen=True)
class Trained:
    """What training leaves; the model itself then has the best weights."""

    steps: int
    best_step: int
    curves: list[dict[str, Any]]  # an entry an evaluation: step, epoch, learning_rate, train_loss, dev_loss, dev_mcc
    tokens: int  # that training took through the model
    seconds: float  # of training, evaluations not included


def total_steps(rows: int, settings: Settings) -> int:
    """Steps of a run over `rows` training rows; the last batch of an epoch may be smaller and counts."""
    limits = [settings.max_steps] if settings.max_steps is not None else []
    if settings.epochs is not None:
        limits.append(settings.epochs * math.ceil(rows / settings.batch_size))
    if not limits:
        raise InputError("neither --epochs nor --max-steps limits the run; give one")
    steps = min(limits)
    if settings.warmup_steps >= steps:
        raise InputError(
            f"--warmup-steps {settings.warmup_steps}: the run has only {steps} steps; give fewer, or a longer run"
        )
    return steps


def rate_factor(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate that step `step` (from 0) of `steps` takes."""
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


def batches(seed: int, rows: int, settings: Settings) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (epoch, rows of the batch, their positions in the order of training) without end."""
    epoch = 0
    while True:
        order = epoch_order(seed, epoch, rows)
        for first in range(0, rows, settings.batch_size):
            chosen = order[first : first + settings.batch_size]
            yield epoch, chosen, epoch * rows + first + np.arange(len(chosen))
        epoch += 1


def train(
    model: Classifier, train_set: Tokens, dev_set: Tokens, settings: Settings, seed: int, device: torch.device
) -> Trained:
    """Train `model` and leave it with the weights of the lowest dev loss; among equals the earliest.

    Raises RuntimeError when a loss is not a number or infinite.
    """
    steps = total_steps(len(train_set.labels), settings)
    optimizer = _optimizer(model, settings)
    labels = torch.from_numpy(train_set.labels)
    source = batches(seed, len(train_set.labels), settings)
    curves: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    best_loss, best_step = math.inf, 0
    loss_sum, loss_rows = torch.zeros((), device=device, dtype=torch.float64), 0
    tokens, evaluating, started = 0, 0.0, time.monotonic()
    model.train()
    for step in progress(range(1, steps + 1), total=steps, unit="steps"):
        epoch, rows, positions = next(source)
        rate = settings.learning_rate * rate_factor(step - 1, settings.warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(train_set.lengths[rows]):
            batch = pack(train_set, rows[part], seed=seed, positions=positions[part]).to(device)
            with precision(device, settings):
                logits = model(batch)
            loss = F.cross_entropy(logits, labels[rows[part]].to(device), reduction="sum")
            (loss / len(rows)).backward()
            loss_sum += loss.detach()
            tokens += len(batch.ids_t)
        loss_rows += len(rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        optimizer.step()
        if step % settings.eval_every and step != steps:
            continue
        paused = time.monotonic()
        train_loss = float(loss_sum) / loss_rows  # not a number if the loss of any of its steps was not
        loss_sum.zero_()
        loss_rows = 0
        logits_nc = predict(model, dev_set, settings, device)
        dev_loss = cross_entropy(logits_nc, dev_set.labels)
        for name, value in (("training", train_loss), ("dev", dev_loss)):
            if not math.isfinite(value):
                raise RuntimeError(f"the {name} loss is {value} at step {step} of {steps}; try a lower --learning-rate")
        dev_mcc = scores(logits_nc, dev_set.labels)["mcc"]
        curves.append(
            {
                "step": step,
                "epoch": epoch,
                "learning_rate": rate,
                "train_loss": train_loss,
                "dev_loss": dev_loss,
                "dev_mcc": dev_mcc,
            }
        )
        log(f"step {step}/{steps}: train loss {train_loss:.4f}, dev loss {dev_loss:.4f}, dev MCC {dev_mcc:.4f}")
        if dev_loss < best_loss:
            best_loss, best_step = dev_loss, step
            best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        model.train()
        evaluating += time.monotonic() - paused
    seconds = time.monotonic() - started - evaluating
    model.load_state_dict(best)
    return Trained(steps, best_step, curves, tokens, seconds)


@torch.inference_mode()
def predict(model: Classifier, tokens: Tokens, settings: Settings, device: torch.device) -> NDArray[np.float32]:
    """Logits of every row [rows, classes], in the order of the file.

    Rows are taken by length, a bounded number of tokens at a time; nothing but the logits is kept.
    """
    model.eval()
    logits_nc = np.empty((len(tokens.labels), model.classifier.out_features), dtype=np.float32)
    for rows in micro_batches(tokens.lengths):
        with precision(device, settings):
            logits_nc[rows] = model(pack(tokens, rows).to(device)).cpu().numpy()
    return logits_nc


@contextmanager
def precision(device: torch.device, settings: Settings) -> Iterator[None]:
    """bf16 for the matrix products if the run says so; weights, norms, softmax and losses stay fp32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bf16"):
        yield


def _optimizer(model: Classifier, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices only, as the Hugging Face Trainer does."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
