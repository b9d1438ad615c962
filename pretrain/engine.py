"""The DeepSpeed engine of a run, and the learning-rate schedule."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.config import Config, OptimizerConfig
from pretrain.distributed import World
from pretrain.model import MaskedLanguageModel
from pretrain.order import micro_batches

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear from 0 to the peak over the warm-up, then linear to 0 at `max_steps` (the paper's schedule).

    `step` counts from 0; the first update has the rate of step 1, so that it is not wasted, and the last one is above 0.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (max_steps - step) / max(1, max_steps - config.warmup_steps)


def build_engine(config: Config, world: World) -> Any:
    """The model, torch's fused AdamW and DeepSpeed around them. The weights are arbitrary: `zero_state.load` sets them.

    No rank ever holds the fp32 state of the whole model: at stage 3 each module is cut up as soon as it is built, below it
    is built in the dtype of the forward passes.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on stdout that it found no GPU
    import deepspeed  # here: it takes seconds to import, and its logger speaks on stdout, which is ours

    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated")  # DeepSpeed calls it
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it takes a step that we leave out for an overflow of fp16
    # On a CPU DeepSpeed would compile this at the first start, which takes a minute; only its inference collectives use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dtype, stage = DTYPES[config.train.dtype], config.deepspeed.zero_stage
    accumulation = micro_batches(config.train.global_batch_size, world.size, config.train.micro_batch_size)
    settings = {
        # Nominal: with uneven rows some micro batches are smaller or empty. Only their number matters to DeepSpeed.
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16": {"enabled": config.train.dtype == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 50_000_000,  # elements; the default 5e8 allocates 2 GB a rank for any model
            "allgather_bucket_size": 50_000_000,
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3), world.device, _default_dtype(dtype):
        model = MaskedLanguageModel(config.model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=0.0,  # set before every step; 0 also makes stage 3's initial step with zero gradients do nothing
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
