"""What happened between two reports of a run: sums of each rank, and the record that they make together."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pretrain.config import Config
from pretrain.distributed import World
from pretrain.flops import mfu, peak_flops, training_flops
from pretrain.loader import MaskedBatch
from pretrain.metrics import memory_gb
from pretrain.timing import StepTimer, slowest


class Interval:
    """One rank's side. `timer` is told of every step; the public numbers are added to by the training loop."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._peak = peak_flops(world.device, config.train.dtype, config.train.peak_tflops)
        self.timer = StepTimer(world.device)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self.skipped_steps, self.checkpoint_stall_seconds = 0, 0.0
        self._tokens, self._squared_lengths, self._masked, self._skipped_sequences = 0, 0, 0, 0
        self._started = time.perf_counter()

    def add(self, batches: Sequence[MaskedBatch]) -> None:
        """Count what this rank has trained on in a step."""
        for batch in batches:
            lengths_b = batch.packed.cu_seqlens.diff().long()
            self._tokens += len(batch.packed.ids_t)
            self._squared_lengths += int((lengths_b * lengths_b).sum())
            self._masked += len(batch.labels_m)
            self._skipped_sequences += batch.skipped

    def record(self, data_wait_seconds: float) -> dict[str, float]:
        """Speed, memory and what was lost, over all ranks; a collective."""
        world, timing = self._world, self.timer.summary()
        seconds = time.perf_counter() - self._started
        tokens, squares, masked, skipped = world.sum(
            self._tokens, self._squared_lengths, self._masked, self._skipped_sequences
        )
        slowest_rank, ratio = slowest(world.gather(timing.pop("busy_seconds") + data_wait_seconds))
        record = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / world.size,
            **timing,
            "data_wait_seconds": world.max(data_wait_seconds),
            "memory_gb": world.max(memory_gb(world.device)),
            "slowest_rank": slowest_rank,
            "slowest_rank_ratio": ratio,
        }
        if self._peak is not None:
            flops = training_flops(self._config.model, int(tokens), int(squares), int(masked))
            record["mfu"] = mfu(flops, seconds, world.size, self._peak)
        stalled = world.max(self.checkpoint_stall_seconds)
        if stalled:
            record["checkpoint_stall_seconds"] = stalled
        if self.skipped_steps:
            record["skipped_steps"] = self.skipped_steps
        if skipped:
            record["skipped_sequences"] = skipped
        return record
