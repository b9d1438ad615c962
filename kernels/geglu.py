"""The gate of the GLU feed-forward layer, with the dropout that follows it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.random import dropout


def geglu(x_t2f: Tensor, *, dropout_p: float = 0.0, dropout_keys_t: Tensor | None = None, site: int = 0) -> Tensor:
    """Dropout(gelu(gate) * up), gelu exact (erf): Shazeer, "GLU variants improve transformer", 2020, GEGLU.

    Args:
        x_t2f: [tokens, 2 * features], any float dtype; the first half is the gate.
        dropout_p, dropout_keys_t, site: as in `kernels.random.dropout`; keys are int64 [tokens].

    Returns:
        [tokens, features] in the dtype of x; computed in fp32 (fp64 for fp64 input).
    """
    gate, up = x_t2f.to(torch.promote_types(x_t2f.dtype, torch.float32)).chunk(2, dim=-1)
    return dropout(F.gelu(gate) * up, dropout_p, dropout_keys_t, site).to(x_t2f.dtype)
