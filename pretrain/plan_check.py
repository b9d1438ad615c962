"""A plan's memory beside that of a real step, on one GPU of this machine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from data_prep.cli import InputError
from pretrain import zero_state, zero_step
from pretrain.compiled import prepare_engine
from pretrain.config import Config
from pretrain.distributed import start
from pretrain.model import Packed
from pretrain.plan_fit import Memory, Way

MICRO_BATCHES = 2  # the second meets the gradients of the first


def check(config: Config, length: int) -> dict[str, Any]:
    """Take a step of two micro batches alone on this machine's GPU, as `train` does.

    Args:
        config: the run's; on one GPU nothing is shared out, so its state has to fit there.
        length: tokens of a sequence.

    Returns bytes `planned` for one rank and `measured` by the allocator, `gpu`, and the `kernels` in use. Raises InputError
    without a GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("--check: this machine has no GPU; leave the flag out")
    rows = config.train.micro_batch_size
    train = config.train.model_copy(update={"global_batch_size": MICRO_BATCHES * rows, "batch_warmup": None})
    config = config.model_copy(update={"train": train})
    world = start()
    try:
        engine, used = prepare_engine(config, world, length)
        zero_state.load(engine, zero_state.InitialState(zero_state.shapes(engine), 0, config.model.initializer_range))
        torch.cuda.reset_peak_memory_stats(world.device)  # trials of kernels take memory too, before there is a model
        tokens = rows * length
        ids_t = torch.randint(5, config.model.vocab_size, (tokens,), device=world.device)
        starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=world.device)
        batch = Packed(ids_t, starts, length, torch.arange(tokens, device=world.device))
        masked = round(rows * (length - 2) * config.data.mask_probability)
        index_m = torch.randperm(tokens, device=world.device)[:masked].sort().values
        for number in range(MICRO_BATCHES):
            engine.set_gradient_accumulation_boundary(number == MICRO_BATCHES - 1)
            loss, _ = engine(batch, index_m, ids_t[index_m])
            engine.backward(loss / masked, scale_wrt_gas=False)
        zero_step.squared_norm(engine)
        zero_step.step(engine, torch.zeros((), device=world.device), None)
        measured = torch.cuda.max_memory_allocated(world.device)
    finally:
        dist.destroy_process_group()
    way = Way(config.deepspeed.zero_stage, rows, config.train.activation_checkpointing, nodes=1)
    return {
        "gpu": torch.cuda.get_device_name(world.device),
        "kernels": used,
        "planned": Memory(config, used, length, 1, 0.0).need(way).peak,
        "measured": measured,
    }
