"""LAMB (You et al., 2020, arXiv 1904.00962, Algorithm 2), right over tensors that hold pieces of many parameters.

LAMB scales the update of a layer by ||weights|| / ||update||. Under ZeRO an optimizer sees flat tensors, of which each rank
has another piece; norms over those would make the result depend on the number of ranks. So squared norms are taken piece by
piece, by the parameter that each belongs to, and summed over the ranks: one all-reduce of two numbers a parameter each call
of `step`, of which there is one a parameter group at ZeRO 1 and 2, one a sub-group at ZeRO 3.

The paper's phi, which may bound ||weights||, is the identity, as in its authors' code. Where a norm is 0 the ratio is 1, and
groups with `adapt=False` have none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """Elements [offset, offset + numel) of a flat tensor belong to parameter number `parameter`."""

    parameter: int
    offset: int
    numel: int


class Lamb(torch.optim.Optimizer):
    """State of a tensor: `step` (fp32 scalar), `exp_avg` and `exp_avg_sq` in its shape, as in torch's AdamW.

    Args:
        params: fp32 tensors, or groups of them; a group may have `adapt`: whether its updates get a trust ratio.

    `found_inf`, `grad_scale`: see `pretrain/optimizer.py`; all stays on the device.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adapt: bool = True
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})
        self._pieces: dict[Tensor, list[Piece]] = {}
        self._index: dict[Tensor, Tensor] = {}  # int64 [pieces], the parameter of each
        self._parameters, self._shared = 0, False

    def lay_out(self, pieces: Iterable[tuple[Tensor, Piece]], parameters: int, shared: bool) -> None:
        """Say what lies where; without it each tensor is a parameter of its own.

        Args:
            pieces: every piece of this rank and the tensor that holds it.
            parameters: of the model, numbered alike on all ranks.
            shared: whether the other ranks hold other pieces, rather than the same.
        """
        by_tensor = defaultdict(list)
        for flat, piece in pieces:
            by_tensor[flat].append(piece)
        self._pieces, self._parameters, self._shared = dict(by_tensor), parameters, shared
        self._index = {
            flat: torch.tensor([piece.parameter for piece in here], device=flat.device) for flat, here in by_tensor.items()
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are for line searches
        """Take a step with the gradients that are there; a collective where tensors are shared."""
        groups = [(flat, group) for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        if not self._parameters:
            each = [(flat, Piece(number, 0, flat.numel())) for number, (flat, _) in enumerate(groups)]
            self.lay_out(each, len(each), shared=False)
        updates = [self._update(flat, group) for flat, group in groups]
        adapted = [(flat, update) for (flat, group), update in zip(groups, updates, strict=True) if group["adapt"]]
        if adapted:
            self._scale(adapted)
        for (flat, group), update in zip(groups, updates, strict=True):
            if self.found_inf is not None:
                update.mul_(1 - self.found_inf)
            flat.sub_(update, alpha=group["lr"])

    def _update(self, flat: Tensor, group: dict[str, Any]) -> Tensor:
        """Move the moments; returns what to take from the weights, but for trust ratio and learning rate."""
        state, gradient = self.state[flat], flat.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        taken = torch.ones_like(step)
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if self.found_inf is not None:  # moments that are moved by 0 times a finite number stay as they are
            gradient = gradient.masked_fill(self.found_inf > 0, 0.0)
            taken = 1 - self.found_inf
        beta_1, beta_2 = group["betas"]
        step.add_(taken)
        first.lerp_(gradient, (1 - beta_1) * taken)
        second.lerp_(gradient * gradient, (1 - beta_2) * taken)
        count = step.double().clamp(min=1)  # 0 where the first step of all is left out
        update = (second / (1 - beta_2**count).float()).sqrt_().add_(group["eps"])
        update = torch.div(first / (1 - beta_1**count).float(), update, out=update)
        return update.add_(flat, alpha=group["weight_decay"])

    def _scale(self, adapted: list[tuple[Tensor, Tensor]]) -> None:
        """Multiply the pieces of updates by the trust ratios of their parameters."""
        held = [(flat, update) for flat, update in adapted if flat in self._pieces]  # a rank may hold nothing but padding
        sums_2n = torch.zeros(2, self._parameters, dtype=torch.float64, device=adapted[0][0].device)
        cut = []
        for flat, update in held:
            pieces = self._pieces[flat]
            weights, steps = ([x.view(-1).narrow(0, p.offset, p.numel) for p in pieces] for x in (flat, update))
            norms_2p = torch.stack(
                [torch.stack(torch._foreach_norm(views, dtype=torch.float64)) for views in (weights, steps)]
            )
            sums_2n.index_add_(1, self._index[flat], norms_2p.square())
            cut.append(steps)
        if self._shared:
            dist.all_reduce(sums_2n)
        weight_n, update_n = sums_2n.sqrt()
        ratio_n = (weight_n / update_n).masked_fill((weight_n == 0) | (update_n == 0), 1.0).float()
        for (flat, _), steps in zip(held, cut, strict=True):
            torch._foreach_mul_(steps, list(ratio_n[self._index[flat]].unbind()))
