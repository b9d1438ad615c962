"""The optimizer step of each ZeRO stage, taken or left out.

Before a step DeepSpeed's optimizers know the global gradient norm, and they can leave an update out: that is what they do
when fp16 overflows. Here the run decides, by a norm that it has asked for first, and DeepSpeed does the rest at every stage.
This module and `zero_state.py` are the only ones that know its private parts (deepspeed 0.19: `runtime/zero/
stage_1_and_2.py`, `runtime/zero/stage3.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch


def gradient_norm(engine: Any) -> float:
    """Norm of the gradient of the global batch, the same on all ranks; NaN when an element of it is not finite.

    A collective; called between the last backward pass of a step and `step`.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups  # here: deepspeed takes seconds to import

    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    # DeepSpeed's own step asks for the norm again; it gets this one, for the sake of hundreds of small kernels.
    if stage == 0:
        norm = torch.stack([parameter.grad.norm() for parameter in engine.module.parameters()]).norm()
    elif stage in (1, 2):
        norm = type(zero).scaled_global_norm(zero)
        zero.scaled_global_norm = lambda *_, **__: norm
    else:
        groups = type(zero)._get_norm_groups(zero)
        zero._get_norm_groups = lambda: groups
        norm = combine_grad_norm_groups(groups)
    value = float(norm)
    return value if math.isfinite(value) and value >= 0 else math.nan  # DeepSpeed marks what is not finite by -1


def step(engine: Any, skip: bool) -> None:
    """`engine.step()`; with `skip` it drops the gradients and changes neither weights nor moments nor Adam's step count.

    `skip` must be the same on all ranks.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer

    def decide(*_: Any, **__: Any) -> bool:
        zero.overflow = skip
        return skip

    if stage == 0 and skip:
        zero.step = lambda: None  # over the class's own; clipping, which comes first, can't do without gradients
        engine.step()
        del zero.step
        return
    if stage in (1, 2):
        zero.check_grad_overflow, zero.check_overflow = True, decide
    elif stage == 3:
        zero._overflow_check_and_loss_scale_update = decide
    engine.step()
