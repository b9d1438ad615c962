"""The three element-wise steps that end each half of a post-LN block: dropout, residual sum, LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.plain.dropout import dropout


def dropout_residual_layer_norm(
    x_td: Tensor,
    residual_td: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    dropout_keys_t: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `kernels.dropout_residual_layer_norm`."""
    wide = torch.promote_types(x_td.dtype, torch.float32)
    z = dropout(x_td.to(wide), dropout_p, dropout_keys_t, site)
    if residual_td is not None:
        z = z + residual_td.to(wide)
    y_td = F.layer_norm(z, z.shape[-1:], weight_d.to(wide), bias_d.to(wide), eps).to(x_td.dtype)
    return y_td, y_td
