"""Dropout by key."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.random import keep_mask, keep_scale


def dropout(x_td: Tensor, p: float, keys_t: Tensor | None, site: int) -> Tensor:
    """As `kernels.dropout`."""
    if p == 0.0 or keys_t is None:
        return x_td
    wide = torch.promote_types(x_td.dtype, torch.float32)  # a scale rounded to bf16 would be off by a thousandth
    factors = keep_mask(keys_t, site, x_td.shape[-1], p).to(wide).mul_(keep_scale(p))
    return (x_td * factors).to(x_td.dtype)
