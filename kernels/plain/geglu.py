"""The gate of the GLU feed-forward layer, with the dropout that follows it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.plain.dropout import dropout


def geglu(x_t2f: Tensor, *, dropout_p: float = 0.0, dropout_keys_t: Tensor | None = None, site: int = 0) -> Tensor:
    """As `kernels.geglu`."""
    gate, up = x_t2f.to(torch.promote_types(x_t2f.dtype, torch.float32)).chunk(2, dim=-1)
    return dropout(F.gelu(gate) * up, dropout_p, dropout_keys_t, site).to(x_t2f.dtype)
