"""`torchrun plan_worker.py`: engines of every ZeRO stage; rank 0 prints what their tensors take, and the allocator's count.

One JSON object on the last line: {"stage-dtype": {"tensors": bytes by field of `State`, most of all ranks; "step": bytes a
step takes at most beside what is there before it}}. The allocator is asked on one rank only: among several, gloo frees in
threads of its own, which the profiler doesn't see.
"""

import gc
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.profiler import profile, record_function

from data_prep.cli import leave
from pretrain import distributed, zero_state, zero_step
from pretrain import engine as engine_module
from pretrain.config import parse_config
from pretrain.engine import build_engine
from pretrain.model import Packed

# Numbers of elements that no number of ranks divides; at stage 3 the word embeddings are cut up, all else is small.
MODEL = {"vocab_size": 2001, "hidden_size": 66, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 301}
CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
MICRO, LENGTH, MASKED, ACCUMULATION = 2, 16, 4, 2
BUCKET_ELEMENTS = 150_000  # smaller than the model, so that there is more than one of them


def config(stage: int, dtype: str, ranks: int) -> Any:
    train = {"dtype": dtype, "global_batch_size": MICRO * ranks * ACCUMULATION, "micro_batch_size": MICRO}
    return parse_config(
        {"run_dir": "-", "data": {"path": "-"}, "model": MODEL, "train": train, "deepspeed": {"zero_stage": stage}}, "here"
    )


def bytes_of(tensors: Any) -> int:
    """Of the storages of these tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def tensors(engine: Any, stage: int, dtype: str) -> dict[str, int]:
    """Between two micro batches of a step."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    adam = zero if stage == 0 else zero.optimizer
    moments = bytes_of(state[kind] for state in adam.state.values() for kind in ("exp_avg", "exp_avg_sq"))
    if stage == 0:
        return {
            "weights": bytes_of(parameters),
            "moments": moments,
            "gradients": bytes_of(p.grad for p in parameters),
        }
    if stage == 3:
        whole = [p for p in parameters if p.ds_persist]
        weights = bytes_of(p.ds_tensor for p in parameters)
        return {
            "weights": weights,
            "small_weights": bytes_of([*whole, *(p.ds_tensor for p in parameters)]) - weights,
            "master_weights": bytes_of(zero.fp32_partitioned_groups_flat),
            "moments": moments,
            "gradients": bytes_of([zero.grad_partitions_flat_buffer]),
            "bucket": bytes_of(bucket.buffer for bucket in zero.ipg_buckets.values()),
        }
    if stage == 1:
        gradients = bytes_of(p.grad for p in parameters)
    else:
        gradients = bytes_of(g for group in zero.all_grad_tensors.values() for g in group)  # until the last micro batch
    return {
        "weights": bytes_of([*parameters, *zero.bit16_groups_flat]),
        "master_weights": bytes_of(zero.single_partition_of_fp32_groups),
        "moments": moments,
        "gradients": gradients,
    }


def run(stage: int, dtype: str, world: distributed.World) -> dict[str, Any]:
    found: dict[str, int] = {}
    gc.collect()  # the engine before
    with profile(profile_memory=True, use_kineto=True) as allocator:
        engine = build_engine(config(stage, dtype, world.size), world)
        zero_state.load(engine, zero_state.InitialState(zero_state.shapes(engine), 0, 0.02))
        for step in range(2):
            with record_function(f"step {step}"):
                for micro in range(ACCUMULATION):
                    engine.set_gradient_accumulation_boundary(micro == ACCUMULATION - 1)
                    ids = torch.randint(5, MODEL["vocab_size"], (MICRO * LENGTH,))
                    starts = torch.arange(0, MICRO * LENGTH + 1, LENGTH, dtype=torch.int32)
                    batch = Packed(ids, starts, LENGTH, torch.arange(MICRO * LENGTH))
                    loss, _ = engine(batch, torch.arange(MASKED), ids[:MASKED])
                    engine.backward(loss)
                    del loss
                    if micro == 0:
                        found = tensors(engine, stage, dtype)
                        engine.step()
                zero_step.squared_norm(engine)
                zero_step.step(engine, torch.zeros((), device=world.device), None)
    most = {key: int(world.max(value)) for key, value in found.items()}
    engine.destroy()
    del engine
    return {"tensors": most} | (allocated(allocator) if world.size == 1 else {})


def allocated(allocator: Any) -> dict[str, int]:
    events = sorted(allocator.kineto_results.events(), key=lambda event: event.start_ns())
    total, peak, before = 0, 0, 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
        elif event.name() == "step 1":
            before, peak = total, total
    return {"step": peak - before}


if __name__ == "__main__":
    engine_module.BUCKET_ELEMENTS = BUCKET_ELEMENTS
    world = distributed.start()
    results = {f"{stage}-{dtype}": run(stage, dtype, world) for stage, dtype in CASES}
    if world.is_first:
        print(json.dumps(results))
    sys.stdout.flush()
    dist.destroy_process_group()
    leave(0)
