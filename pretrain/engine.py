"""The DeepSpeed engine of a run, and the learning-rate schedule."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from pretrain.config import Config, OptimizerConfig
from pretrain.distributed import World
from pretrain.model import MaskedLanguageModel, initialize
from pretrain.order import micro_batches


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear from 0 to the peak over the warm-up, then linear to 0 at `max_steps` (the paper's schedule).

    `step` counts from 0; the first update has the rate of step 1, so that it is not wasted, and the last one is above 0.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (max_steps - step) / max(1, max_steps - config.warmup_steps)


def build_engine(config: Config, world: World) -> Any:
    """Model with weights drawn from the seed, torch's fused AdamW, and DeepSpeed around them."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on stdout that it found no GPU
    import deepspeed  # here: it takes seconds to import, and its logger speaks on stdout, which is ours

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On a CPU DeepSpeed would compile this at the first start, which takes a minute; only its inference collectives use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = MaskedLanguageModel(config.model)
    initialize(model, config.train.seed, config.model.initializer_range)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=0.0,  # set before every step; 0 also makes stage 3's initial step with zero gradients do nothing
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    accumulation = micro_batches(config.train.global_batch_size, world.size, config.train.micro_batch_size)
    settings = {
        # Nominal: with uneven rows some micro batches are smaller or empty. Only their number matters to DeepSpeed.
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        # Unchecked: DeepSpeed would skip the update without a word, and its step count would no longer be ours.
        "bf16": {"enabled": config.train.dtype == "bf16", "check_grad_overflow": False},
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "reduce_bucket_size": 50_000_000,  # elements; the default 5e8 allocates 2 GB a rank for any model
            "allgather_bucket_size": 50_000_000,
        },
    }
    engine, *_ = deepspeed.initialize(model=model.to(world.device), optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gradient_norm_before_step(engine: Any) -> float | None:
    """Global gradient norm at stage 0, where DeepSpeed keeps none; call after the last backward pass of a step."""
    if engine.zero_optimization_stage() > 0:
        return None
    norms = [parameter.grad.norm() for parameter in engine.module.parameters()]
    return float(torch.stack(norms).norm())
