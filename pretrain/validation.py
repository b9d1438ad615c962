"""Loss and accuracy on the validation split, as a whole and by species category."""

from __future__ import annotations

from typing import Any

import torch

from data_prep.cli import log
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.loader import Loader, MaskedBatch
from pretrain.prefetch import Prefetch
from pretrain.watchdog import Watchdog


class Validation:
    """The same sequences with the same masks every time, so they are read once."""

    def __init__(self, config: Config, world: World, loader: Loader, engine: Any, watchdog: Watchdog) -> None:
        self._config, self._world, self._loader, self._engine, self._watchdog = config, world, loader, engine, watchdog
        self._batches: list[tuple[str, MaskedBatch]] | None = None

    @torch.no_grad()
    def run(self, step: int) -> dict[str, float]:
        """Loss (nats a masked token) and accuracy, without dropout; {} where there is nothing to validate. A collective."""
        batches, device = self._read(), self._world.device
        categories = sorted({category for category, _ in batches})
        sums = {category: torch.zeros(3, dtype=torch.float64, device=device) for category in categories}
        self._engine.eval()
        for category, batch in batches:
            self._watchdog.enter(f"validation after step {step}", self._config.watchdog.step_seconds)
            there = batch.to(device)
            loss, correct = self._engine(there.packed, there.index_m, there.labels_m)
            sums[category] += torch.stack([loss.double(), correct.double(), loss.new_tensor(len(batch.labels_m)).double()])
        self._engine.train()
        flat = self._world.sum(*(number for category in categories for number in sums[category].tolist()))
        by_category = {category: flat[3 * i : 3 * i + 3] for i, category in enumerate(categories)}
        loss_sum, correct_sum, count = (sum(row[i] for row in by_category.values()) for i in range(3))
        if count == 0:  # an empty validation split has no loss, not one of 0
            return {}
        return {
            "validation_loss": loss_sum / count,
            "validation_masked_accuracy": correct_sum / count,
            **{f"validation_loss/{name}": row[0] / row[2] for name, row in by_category.items() if name and row[2]},
        }

    def _read(self) -> list[tuple[str, MaskedBatch]]:
        """This rank's batches; a rank that can't read them fails all alike."""
        if self._batches is None:
            data, failure = self._config.data, None
            items = Prefetch(
                self._loader.validation(), data.prefetch_steps, data.stall_seconds, self._loader.valid_pool.in_flight
            )
            try:
                self._batches = list(items)
            except Exception as error:
                failure = error
            items.close()
            (skipped,) = self._world.agree(failure, sum(batch.skipped for _, batch in self._batches or []))
            if skipped and self._world.is_first:
                log(f"{skipped:.0f} validation sequences are in damaged blocks and left out")
        return self._batches or []
