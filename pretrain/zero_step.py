"""The optimizer step of each ZeRO stage, taken or left out as a number on the device says.

DeepSpeed's own steps ask for the global gradient norm and read on the host whether it is finite, to know whether to leave
the update out. Here the run judges the norm itself, on the device, together with the loss, and the optimizer obeys
(`pretrain/optimizer.py`); so DeepSpeed's questions are switched off and the host can go ahead of a GPU. A step that is left
out goes through the same copies and collectives as any other, of the same numbers.

What still makes the host wait is DeepSpeed's own: at stage 3 the end of each backward pass waits for the stream that reduces
gradients, and fetching parameters may wait for older fetches. Gradients are reduced once a step at stages 0 and 1, and after
each micro batch at stages 2 and 3, which don't keep them whole.

This module and `zero_state.py` are the only ones that know DeepSpeed's private parts (deepspeed 0.19: `runtime/zero/
stage_1_and_2.py`, `runtime/zero/stage3.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.zero_state import inner_optimizer


def leave_judging_to_us(engine: Any) -> None:
    """Switch off what DeepSpeed's optimizer would ask about gradients; called once, before the first step."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.compute_grad_norm = zero.check_grad_overflow = False
    elif stage == 3:
        zero._get_norm_groups = lambda: [0.0]  # a norm on the host that is no reason for anything
        zero.unscale_and_clip_grads = lambda *_: None  # by 1: there is no loss scale, and clipping is the optimizer's


def squared_norm(engine: Any) -> Tensor:
    """This rank's share of the squared norm of the gradient of the global batch: summed over ranks, it is whole.

    fp64, a scalar on the device, not finite where an element is not. Between the last backward pass of a step and `step`.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters()]
    else:
        gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group]
    total = torch.stack(torch._foreach_norm(gradients, dtype=torch.float64)).square().sum()
    return total / engine.world_size if stage == 0 else total  # at stage 0 every rank has all of it


def step(engine: Any, found_inf: Tensor, grad_scale: Tensor | None) -> None:
    """`engine.step()`, after the last micro batch of a step.

    Args:
        found_inf: fp32 scalar on the device, the same on all ranks: 1 changes neither weights nor moments nor the
            optimizer's count of steps, 0 takes the step.
        grad_scale: fp32 scalar on the device by which gradients are divided first; None: 1.
    """
    optimizer = inner_optimizer(engine)
    optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
    engine.step()
