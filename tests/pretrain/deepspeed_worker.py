"""`torchrun deepspeed_worker.py OUT`: trains as a stranger's code would, under each of CASES, and saves it twice.

OUT/<case>/theirs is what `engine.save_checkpoint` writes, OUT/<case>/ours a checkpoint of ours of the same moment.
"""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.cli import leave
from pretrain import checkpoint, distributed, zero_state
from pretrain.model import MaskedLanguageModel, Packed, initialize
from tests.pretrain.directories import CONFIG

BF16 = {"bf16": {"enabled": True}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = {  # name: how parameters are given to AdamW, what zero_optimization says, what else does
    "0": ("one group", {"stage": 0}, {}),
    "0-groups": ("two groups", {"stage": 0}, {}),
    "0-named": ("by name", {"stage": 0}, {}),
    "0-bf16": ("two groups", {"stage": 0}, BF16),
    "0-bf16-fused": ("two groups", {"stage": 0}, BF16),
    "1": ("one group", {"stage": 1}, {}),
    "1-elastic": ("one group", {"stage": 1, "elastic_checkpoint": True}, {}),
    "1-bf16": ("two groups", {"stage": 1}, BF16 | FP32_GRADIENTS),
    "2": ("two groups", {"stage": 2}, {}),
    "2-round-robin": ("two groups", {"stage": 2, "round_robin_gradients": True}, {}),
    "2-bf16": ("reversed", {"stage": 2, "parameter_alignment": True}, BF16),
    "3": ("two groups", {"stage": 3, "sub_group_size": 1000}, {}),
    "3-bf16": ("one group", {"stage": 3, "stage3_param_persistence_threshold": 100}, BF16),
}


def given(model, how):
    if how == "two groups":  # as BERT's own code has it: biases and LayerNorms are not decayed
        apart = [n for n, _ in model.named_parameters() if "bias" in n or "LayerNorm.weight" in n]
        others = [p for n, p in model.named_parameters() if n not in apart]
        return [{"params": others}, {"params": [p for n, p in model.named_parameters() if n in apart], "weight_decay": 0.0}]
    if how == "by name":
        return sorted(model.named_parameters())
    return list(model.parameters())[:: -1 if how == "reversed" else 1]


def fragments(engine, rank, ranks):
    """What zero_state.py says this rank owns. It knows the stages that we train with; others are asked of DeepSpeed."""
    kind = type(engine.optimizer).__name__
    names = {id(p): n for n, p in engine.module.named_parameters()}
    if kind == "BF16_Optimizer":
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for parameter in engine.module.parameters():  # collectives
            moments = {k: safe_get_full_optimizer_state(parameter, k) for k in ("exp_avg", "exp_avg_sq")}
            kinds = {"weight": safe_get_full_fp32_param(parameter), **moments}
            if rank == 0:
                yield checkpoint.Fragment(names[id(parameter)], 0, {k: t.detach().flatten() for k, t in kinds.items()})
    elif kind in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        zero = engine.optimizer
        masters = zero.fp32_groups if kind == "FP16_UnfusedOptimizer" else [[flat] for flat in zero.fp32_groups_flat]
        for group, tensors in zip(zero.fp16_groups, masters, strict=True):
            states = [{"weight": tensor.detach(), **zero.optimizer.state[tensor]} for tensor in tensors]
            flat = {k: torch.cat([state[k].flatten() for state in states]) for k in checkpoint.KINDS}
            pieces = {k: t.split([p.numel() for p in group]) for k, t in flat.items()}
            for number, parameter in enumerate(group if rank == 0 else ()):
                yield checkpoint.Fragment(names[id(parameter)], 0, {k: p[number] for k, p in pieces.items()})
    else:
        yield from zero_state.owned_fragments(engine, rank, ranks)


def adam_steps(engine):
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.values()
    return {int(state["step"]) for state in states if "step" in state}


def save(engine, world, out):
    engine.save_checkpoint(str(out / "theirs"))
    if getattr(engine.optimizer, "round_robin_gradients", False):
        return  # deepspeed 0.19 doesn't know itself what lies where then, and zero_state.py asks it; all is as in "2"
    gathered = [None] * world.size
    dist.all_gather_object(gathered, list(fragments(engine, world.rank, world.size)))
    if world.is_first:
        (step,) = adam_steps(engine)
        checkpoint.save(
            out / "ours",
            step=engine.global_steps,
            life="worker",
            fragments=[fragment for rank in gathered for fragment in rank],
            shapes=zero_state.shapes(engine),
            model=CONFIG.model_dump(),
            state={"optimizer_step": step},
        )


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for inference only
    world = distributed.start()
    for name, (how, zero, others) in CASES.items():
        # DeepSpeed's FusedAdam needs a GPU. It has a checkpoint layout of its own, which this gives to torch's.
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW if name.endswith("fused") else deepspeed.ops.adam.FusedAdam
        model = MaskedLanguageModel(CONFIG)
        initialize(model, 0, 0.3)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **others}
        adamw = torch.optim.AdamW(given(model, how), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
        generator = torch.Generator().manual_seed(world.rank)
        for _ in range(2):
            ids = torch.randint(5, CONFIG.vocab_size, (12,), generator=generator)
            batch = Packed(ids, torch.tensor([0, 5, 12], dtype=torch.int32), max_seqlen=7)
            loss, _ = engine(batch, torch.tensor([1, 2, 6]), ids[[1, 2, 6]])
            engine.backward(loss)
            engine.step()
        save(engine, world, Path(sys.argv[1]) / name)
    dist.destroy_process_group()
    leave(0)
