"""Our whole training step, as `train` takes it: loader, DeepSpeed engine, verdict, optimizer; and what it is made of."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_prep.dataset import Dataset
from pretrain import zero_state
from pretrain.bad_steps import BadSteps
from pretrain.compiled import prepare_engine
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.flops import training_flops
from pretrain.loader import Loader, MaskedBatch
from pretrain.prefetch import Prefetch
from pretrain.timing import StepTimer
from pretrain.training_step import TrainingSteps

# What a matrix product is called: operations on a CPU, kernels on a GPU. Attention's two products are in its own.
PRODUCTS_CPU = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mkldnn::")
PRODUCTS_GPU = ("gemm", "nvjet", "cutlass", "xmma", "attention", "splitk")


class OurStep:
    """Builds everything a run has but its directory; then one step after another."""

    def __init__(self, config: Config, dataset: Dataset, world: World) -> None:
        self.config, self.world, self.taken = config, world, 0
        self.engine, self.kernels = prepare_engine(config, world, dataset.manifest["sequence_length"])
        shapes = zero_state.shapes(self.engine)
        zero_state.load(self.engine, zero_state.InitialState(shapes, config.train.seed, config.model.initializer_range))
        loader = Loader(config, dataset, world.rank, world.size, pin=world.device.type == "cuda")
        data = config.data
        self.batches = Prefetch(loader.steps(0), data.prefetch_steps, data.stall_seconds, loader.train_pool.in_flight)
        self.judge = BadSteps(config.bad_steps, world.device)

    def step(self, batches: Sequence[MaskedBatch], engine: Any = None) -> None:
        """Train on this rank's micro batches. `engine`: one that stands in for ours."""
        train, timer = self.config.train, StepTimer(self.world.device)
        (masked,) = self.world.agree(None, sum(len(batch.labels_m) for batch in batches))
        steps = TrainingSteps(self.config, self.world, engine or self.engine, self.judge, timer)
        steps.take(batches, masked, self.taken, self.taken * train.global_batch_size, train.global_batch_size)
        self.taken += 1

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds a step, by part: `data` (waited for), `forward`, `backward`, and `optimizer` with the gradient's norm.

        On a GPU each part is waited for, so that they sum to a little more than a step takes.
        """
        timed = _TimedEngine(self.engine, self.world.device)
        self.batches.waited, whole = 0.0, 0.0
        for _ in range(steps):
            started = now(self.world.device)
            self.step(next(self.batches), timed)
            whole += now(self.world.device) - started
        spent = {"data": self.batches.waited, "forward": timed.forward_seconds, "backward": timed.backward_seconds}
        spent["optimizer"] = whole - sum(spent.values())
        return {name: seconds / steps for name, seconds in spent.items()}

    def profile(self, steps: int) -> tuple[dict[str, float], list[tuple[str, float]]]:
        """Share of a step's time by operation (kernel, on a GPU): of kinds, and of the 25 largest by name.

        Kinds are `matrix_products`, attention's among them, `optimizer`, `compiled_layers` and `other`, which on a CPU has
        what Python takes between the operations.
        """
        on_gpu = self.world.device.type == "cuda"
        ready = [next(self.batches) for _ in range(steps)]
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for batches in ready:
                with contextlib.nullcontext() if on_gpu else record_function("training step"):
                    self.step(batches)
            now(self.world.device)
        shares = dict.fromkeys(("matrix_products", "optimizer", "compiled_layers", "other"), 0.0)
        names: dict[str, float] = {}
        for event in profiler.key_averages():
            names[event.key] = spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            shares[_kind(event.key, PRODUCTS_GPU if on_gpu else PRODUCTS_CPU)] += spent
        total = sum(shares.values())
        largest = sorted(names.items(), key=lambda item: -item[1])[:25]
        return {kind: spent / total for kind, spent in shares.items()}, [(name, spent / total) for name, spent in largest]


def _kind(name: str, products: Sequence[str]) -> str:
    if any(word in name.lower() for word in products):
        return "matrix_products"
    if "adam" in name.lower():
        return "optimizer"
    return "compiled_layers" if "CompiledFxGraph" in name or name.startswith("triton_") else "other"


class _TimedEngine:
    """The engine, with the seconds that pass in its forward and backward passes."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self.forward_seconds, self.backward_seconds = 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any) -> Any:
        started = now(self._device)
        result = self._engine(*args)
        self.forward_seconds += now(self._device) - started
        return result

    def backward(self, *args: Any, **options: Any) -> None:
        started = now(self._device)
        self._engine.backward(*args, **options)
        self.backward_seconds += now(self._device) - started


def now(device: torch.device) -> float:
    """The clock, when all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def count(batches: Sequence[MaskedBatch]) -> dict[str, int]:
    """Real tokens ([CLS] and [SEP] among them), the sum of squared lengths, and predicted tokens."""
    lengths = [batch.packed.cu_seqlens.diff().long() for batch in batches]
    return {
        "tokens": sum(len(batch.packed.ids_t) for batch in batches),
        "squared_lengths": sum(int((length_b**2).sum()) for length_b in lengths),
        "masked": sum(len(batch.labels_m) for batch in batches),
    }


def flops(config: Config, counted: dict[str, int]) -> int:
    """Matrix FLOPs of a step on them."""
    return training_flops(config.model, counted["tokens"], counted["squared_lengths"], counted["masked"])
