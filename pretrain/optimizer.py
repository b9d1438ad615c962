"""Which optimizer a run uses, and who computes it.

Before every step the run says on the device whether to take it and how to clip: `found_inf`, an fp32 scalar that is 1 where
nothing may change, and `grad_scale`, None or one by which gradients are divided first. torch's fused AdamW and our LAMB read
them in their kernels. apex's and DeepSpeed's FusedAdam know no such thing, so the host reads the one and divides by the
other before it calls them, which costs a wait for the GPU and a pass over the gradients every step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from data_prep.cli import InputError, one_line
from pretrain.config import OptimizerConfig
from pretrain.lamb import Lamb

TORCH = "torch.optim.AdamW(fused=True)"
BUILT = {"apex": "apex.optimizers", "deepspeed": "deepspeed.ops.adam"}  # where their FusedAdam is


class HostJudged:
    """Put before a class of optimizers that know neither `found_inf` nor `grad_scale`."""

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    param_groups: list[dict[str, Any]]

    def step(self, closure: Any = None) -> Any:
        """The step of the class behind this one, if it is to be taken."""
        if self.found_inf is not None and self.found_inf.item():
            return None
        if self.grad_scale is not None:
            parameters = (parameter for group in self.param_groups for parameter in group["params"])
            torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], self.grad_scale)
        return super().step(closure)  # type: ignore[misc]


def name_of(config: OptimizerConfig) -> str:
    """What stands in the log and in checkpoints."""
    if config.name == "lamb":
        return "pretrain.lamb.Lamb"
    return f"{BUILT[config.implementation]}.FusedAdam" if config.implementation in BUILT else TORCH


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a run over the parameters of its model, which ZeRO 3 may have cut up already.

    The learning rate is set before every step. Raises InputError when a FusedAdam that the configuration names can't be
    imported, built or run on `device`.
    """
    every = list(parameters)
    groups: list[dict[str, Any]] = [{"params": every}]
    if not config.decay_norms_and_biases:  # they are what has one dimension
        narrow = [parameter for parameter in every if len(getattr(parameter, "ds_shape", parameter.shape)) == 1]
        narrow_ids = {id(parameter) for parameter in narrow}
        wide = [parameter for parameter in every if id(parameter) not in narrow_ids]
        groups = [{"params": wide}, {"params": narrow, "weight_decay": 0.0}]
        if config.name == "lamb":
            groups[1]["adapt"] = False
    common: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "lamb":
        return Lamb(groups, **common)
    if config.implementation not in BUILT:
        return torch.optim.AdamW(groups, fused=True, **common)
    return _fused_adam(config.implementation, device)(groups, adam_w_mode=True, **common)


def _fused_adam(implementation: str, device: torch.device) -> Any:
    """The class, tried on one number: building, loading and launching their kernels fail only there."""
    try:
        theirs = importlib.import_module(BUILT[implementation]).FusedAdam
        tried = torch.nn.Parameter(torch.zeros(1, device=device))
        tried.grad = torch.ones_like(tried)
        theirs([tried], lr=1.0, adam_w_mode=True).step()
        if not bool(tried < 0):
            raise RuntimeError("its step changes nothing")
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"optimizer.implementation={implementation}: {BUILT[implementation]}.FusedAdam can't be used: {reason}; install "
            "what it misses (docs/install.md), or leave it at auto"
        ) from None
    return type("FusedAdam", (HostJudged, theirs), {})


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Say how many steps the optimizer has taken, where it has the state of every parameter already."""
    if isinstance(optimizer, HostJudged):  # DeepSpeed's counts by parameter, apex's by group, both on the host
        for counted in (*optimizer.state.values(), *optimizer.param_groups):
            counted["step"] = steps
    else:
        for state in optimizer.state.values():
            state["step"].fill_(steps)
