"""One fine-tuning: AdamW over shuffled batches, dev after every so many steps, the best weights kept.

A single process on one device. The learning rate rises linearly from 0 over the warm-up and falls linearly to 0 at the
end (`get_linear_schedule_with_warmup` of Hugging Face, which the published scripts used: the first step's rate is 0).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.cli import InputError, log, progress
from finetune.batches import epoch_order, micro_batches, pack
from finetune.metrics import Objective
from finetune.model import Classifier
from finetune.results import LINEAR
from finetune.tasks import Settings
from finetune.tokens import Tokens


@dataclass(frozen=True)
class Trained:
    """What training leaves; the model itself then has the best weights."""

    steps: int
    best_step: int
    stopped_early: bool
    curves: list[dict[str, Any]]  # an entry an evaluation: step, epoch, learning_rate, train_loss, dev_loss, dev_<score>
    tokens: int  # that training took through the model
    seconds: float  # of training, evaluations not included


def fitting_warmup(settings: Settings, rows: int, given: Collection[str]) -> tuple[Settings, set[str]]:
    """The settings with a warm-up that is shorter than the run, and what was changed: one that was given stays as it is."""
    steps = [settings.epochs * math.ceil(rows / settings.batch_size)] if settings.epochs is not None else []
    steps += [settings.max_steps] if settings.max_steps is not None else []
    if not steps or settings.method in LINEAR or "warmup_steps" in given or settings.warmup_steps < min(steps):
        return settings, set()
    warmup = min(steps) // 10
    log(f"the run has {min(steps)} steps, so its warm-up is {warmup} steps instead of {settings.warmup_steps}")
    return settings.model_copy(update={"warmup_steps": warmup}), {"warmup_steps"}


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


class Step:
    """One optimizer step after another over the rows that it is given."""

    def __init__(
        self, model: nn.Module, train_set: Tokens, objective: Objective, settings: Settings, seed: int, device: torch.device
    ) -> None:
        self.model, self.train_set, self.settings, self.seed, self.device = model, train_set, settings, seed, device
        self.targets = torch.from_numpy(objective.targets(train_set.labels))
        self.regression = objective.classes == 1
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.parameters, settings)
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)  # over rows; stays on the device
        self.tokens = 0

    def __call__(self, rows: NDArray[np.int64], positions: NDArray[np.int64], rate: float) -> None:
        """Train on `rows` [b], which stand at `positions` [b] in the order of training, with this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(self.train_set.lengths[rows]):
            batch = pack(self.train_set, rows[part], seed=self.seed, positions=positions[part]).to(self.device)
            with precision(self.device, self.settings):
                raw = self.model(batch)
            loss = self.loss(raw, self.targets[rows[part]].to(self.device))
            (loss / len(rows)).backward()
            self.loss_sum += loss.detach()
            self.tokens += len(batch.ids_t)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clipping)
        self.optimizer.step()

    def loss(self, raw_bc: Tensor, targets_b: Tensor) -> Tensor:
        """Summed over the sequences."""
        if self.regression:
            return F.mse_loss(raw_bc[:, 0], targets_b, reduction="sum")
        return F.cross_entropy(raw_bc, targets_b, reduction="sum")


def train(
    model: nn.Module,
    train_set: Tokens,
    dev_set: Tokens,
    objective: Objective,
    settings: Settings,
    seed: int,
    device: torch.device,
) -> Trained:
    """Train the parameters that require gradients and leave `model` with the best weights.

    The best are those of the lowest dev loss, or of the highest dev score and among equals the lowest loss; then the
    earliest. Raises RuntimeError when a loss is not a number or infinite.
    """
    steps = total_steps(len(train_set.labels), settings)
    take_step = Step(model, train_set, objective, settings, seed, device)
    source = batches(seed, len(train_set.labels), settings)
    curves: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    best_rank, best_step, worse, loss_rows = (-math.inf, -math.inf), 0, 0, 0
    evaluating, started, step = 0.0, time.monotonic(), 0
    model.train()
    for step in progress(range(1, steps + 1), total=steps, unit="steps"):
        epoch, rows, positions = next(source)
        rate = settings.learning_rate * rate_factor(step - 1, settings.warmup_steps, steps)
        take_step(rows, positions, rate)
        loss_rows += len(rows)
        if step % settings.eval_every and step != steps:
            continue
        paused = time.monotonic()
        train_loss = float(take_step.loss_sum) / loss_rows  # not a number if the loss of any of its steps was not
        take_step.loss_sum.zero_()
        loss_rows = 0
        dev = objective.evaluate(objective.outputs(predict(model, dev_set, objective, settings, device)), dev_set.labels)
        for name, value in (("training", train_loss), ("dev", dev["loss"])):
            if not math.isfinite(value):
                raise RuntimeError(f"the {name} loss is {value} at step {step} of {steps}; try a lower --learning-rate")
        entry = {"step": step, "epoch": epoch, "learning_rate": rate, "train_loss": train_loss, "dev_loss": dev["loss"]}
        curves.append(entry | {f"dev_{objective.score}": dev[objective.score]})
        log(
            f"step {step}/{steps}: train loss {train_loss:.4f}, dev loss {dev['loss']:.4f}, "
            f"dev {objective.score} {dev[objective.score]:.4f}"
        )
        rank = (dev[objective.score] if settings.best_by == "score" else 0.0, -dev["loss"])
        worse += 1
        if rank > best_rank:
            best_rank, best_step, worse = rank, step, 0
            best = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        model.train()
        evaluating += time.monotonic() - paused
        if settings.patience is not None and worse >= settings.patience:
            log(f"stopped: no better model for {worse} evaluations")
            break
    seconds = time.monotonic() - started - evaluating
    model.load_state_dict(best, strict=False)
    return Trained(step, best_step, step < steps, curves, take_step.tokens, seconds)


@torch.inference_mode()
def predict(
    model: nn.Module, tokens: Tokens, objective: Objective, settings: Settings, device: torch.device
) -> NDArray[np.float32]:
    """What the model puts out for every row [rows, classes], in the order of the file; see `Objective.outputs`.

    Rows are taken by length, a bounded number of tokens at a time; nothing but these numbers is kept.
    """
    model.eval()
    raw_nc = np.empty((len(tokens.starts) - 1, objective.classes), dtype=np.float32)
    for rows in micro_batches(tokens.lengths):
        with precision(device, settings):
            raw_nc[rows] = model(pack(tokens, rows).to(device)).float().cpu().numpy()
    return raw_nc


@torch.inference_mode()
def embed(model: Classifier, tokens: Tokens, settings: Settings, device: torch.device) -> NDArray[np.float32]:
    """Pooled states of every row [rows, hidden], before the pooler's dense layer; otherwise as `predict`."""
    model.eval()
    pooled_nd = np.empty((len(tokens.starts) - 1, model.classifier.in_features), dtype=np.float32)
    for rows in micro_batches(tokens.lengths):
        with precision(device, settings):
            pooled_nd[rows] = model.bert.embed(pack(tokens, rows).to(device)).float().cpu().numpy()
    return pooled_nd


@contextmanager
def precision(device: torch.device, settings: Settings) -> Iterator[None]:
    """bf16 for the matrix products if the run says so; weights, norms, softmax and losses stay fp32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bf16"):
        yield


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices only, as the Hugging Face Trainer does."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
