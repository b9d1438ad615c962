"""Loss, accuracy and bits a base on the validation split, as a whole and by species category."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from data_prep.cli import log
from data_prep.codec import Codec
from pretrain.bits import hidden_bases
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.loader import Loader, MaskedBatch
from pretrain.prefetch import Prefetch
from pretrain.watchdog import Watchdog


@dataclass(frozen=True)
class _Part:
    """One batch, of sequences of one category."""

    category: str
    batch: MaskedBatch
    hidden_labels_m: Tensor  # int64 [m], `labels_m` where the token has hidden bases, else IGNORE_INDEX
    bases: int  # hidden ones, summed over those tokens


class Validation:
    """The same sequences with the same masks every time, so they are read once."""

    def __init__(self, config: Config, world: World, loader: Loader, engine: Any, watchdog: Watchdog) -> None:
        self._config, self._world, self._loader, self._engine, self._watchdog = config, world, loader, engine, watchdog
        self._parts: list[_Part] | None = None

    @torch.no_grad()
    def run(self, step: int) -> dict[str, float]:
        """Loss (nats a masked token), accuracy and bits a base (`pretrain.bits`), without dropout. A collective.

        {} where there is nothing to validate, and no bits where no token is replaced by [MASK].
        """
        parts, device = self._read(), self._world.device
        categories = sorted({part.category for part in parts})
        sums = {category: torch.zeros(5, dtype=torch.float64, device=device) for category in categories}
        self._engine.eval()
        for part in parts:
            self._watchdog.enter(f"validation after step {step}", self._config.watchdog.step_seconds)
            there = part.batch.to(device)
            # Through the engine, without which ZeRO 3 has no parameters; scored here, because one pass gives two losses.
            logits_mv = self._engine(there.packed, there.index_m)
            loss, count, correct = kernels.masked_cross_entropy(logits_mv, there.labels_m)
            hidden_loss, _, _ = kernels.masked_cross_entropy(logits_mv, part.hidden_labels_m.to(device))
            numbers = [loss, correct, count, hidden_loss, loss.new_tensor(part.bases, dtype=torch.float64)]
            sums[part.category] += torch.stack([number.double() for number in numbers])
        self._engine.train()
        flat = self._world.sum(*(number for category in categories for number in sums[category].tolist()))
        by_category = {category: flat[5 * i : 5 * i + 5] for i, category in enumerate(categories)}
        loss_sum, correct_sum, total, hidden_sum, bases = (sum(row[i] for row in by_category.values()) for i in range(5))
        if total == 0:  # an empty validation split has no loss, not one of 0
            return {}
        named = {name: row for name, row in by_category.items() if name}
        return {
            "validation_loss": loss_sum / total,
            "validation_masked_accuracy": correct_sum / total,
            **({"validation_bits_per_base": hidden_sum / math.log(2) / bases} if bases else {}),
            **{f"validation_loss/{name}": row[0] / row[2] for name, row in named.items() if row[2]},
            **{f"validation_bits_per_base/{name}": row[3] / math.log(2) / row[4] for name, row in named.items() if row[4]},
        }

    def _read(self) -> list[_Part]:
        """This rank's batches; a rank that can't read them fails all alike."""
        if self._parts is None:
            data, failure, parts = self._config.data, None, []
            items = Prefetch(
                self._loader.validation(), data.prefetch_steps, data.stall_seconds, self._loader.valid_pool.in_flight
            )
            try:
                codec = Codec(self._loader.dataset.tokenizer_path)
                parts = [_part(category, batch, codec) for category, batch in items]
            except Exception as error:
                failure = error
            items.close()
            (skipped,) = self._world.agree(failure, sum(part.batch.skipped for part in parts))
            if skipped and self._world.is_first:
                log(f"{skipped:.0f} validation sequences are in damaged blocks and left out")
            self._parts = parts
        return self._parts


def _part(category: str, batch: MaskedBatch, codec: Codec) -> _Part:
    bases_m = torch.from_numpy(hidden_bases(batch, codec))
    return _Part(category, batch, batch.labels_m.where(bases_m > 0, kernels.IGNORE_INDEX), int(bases_m.sum()))
