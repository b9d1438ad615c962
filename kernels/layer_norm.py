"""The three element-wise steps that end each half of a post-LN block: dropout, residual sum, LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.random import dropout


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
) -> Tensor:
    """LayerNorm(Dropout(x) + residual) over the last axis, the biased variance as in torch.

    Args:
        x_td: [tokens, hidden], any float dtype.
        residual_td: [tokens, hidden] of the same dtype, or None for no residual.
        weight_d, bias_d: [hidden].
        eps: added to the variance; 1e-12 in this model family, which fp32 statistics need no more than.
        dropout_p, dropout_keys_t, site: as in `kernels.random.dropout`; keys are int64 [tokens].

    Returns:
        [tokens, hidden] in the dtype of x; sum and statistics are fp32 (fp64 for fp64 input).
    """
    wide = torch.promote_types(x_td.dtype, torch.float32)
    z = dropout(x_td.to(wide), dropout_p, dropout_keys_t, site)
    if residual_td is not None:
        z = z + residual_td
    return F.layer_norm(z, z.shape[-1:], weight_d.to(wide), bias_d.to(wide), eps).to(x_td.dtype)
