"""LayerNorm by NVIDIA's apex, where it is installed: dropout and sum in PyTorch, then one of its kernels.

apex has to be built from NVIDIA's source (the package "apex" in the Python index is another project); its kernels may be
missing although it can be imported. FastLayerNorm (`apex.contrib.layer_norm`) is taken for the hidden sizes that it has,
FusedLayerNorm (`apex.normalization`) for the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.choice import Unavailable
from kernels.plain.dropout import dropout
from kernels.plain.layer_norm import dropout_residual_layer_norm as plain

# Hidden sizes up to 8,192 that FastLayerNorm was compiled for (apex/contrib/csrc/layer_norm).
FAST_SIZES = (768, 1024, 1536, 2048, 2304, 3072, 3840, 4096, 5120, 6144, 8192)


def load() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function with the signature of `kernels.dropout_residual_layer_norm`. Unavailable says what is missing."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError as error:
        raise Unavailable(f"NVIDIA's apex can't be imported ({error}); it is built from its source") from None
    try:
        from apex.contrib.layer_norm.layer_norm import FastLayerNormFN
    except ImportError:
        FastLayerNormFN = None

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
        """As `kernels.dropout_residual_layer_norm`; the sum is rounded to the dtype of x before its statistics."""
        if len(x_td) == 0:  # an empty grid is an error
            return plain(x_td, residual_td, weight_d, bias_d, eps)
        z_td = dropout(x_td, dropout_p, dropout_keys_t, site)
        if residual_td is not None:
            z_td = (z_td + residual_td).to(x_td.dtype)
        weight_d, bias_d = weight_d.to(x_td.dtype), bias_d.to(x_td.dtype)
        with torch.autocast(x_td.device.type, enabled=False):  # it would round fp32 input
            if FastLayerNormFN is not None and x_td.shape[1] in FAST_SIZES:
                y_td = FastLayerNormFN.apply(z_td, weight_d, bias_d, eps, False)  # the last: not to rebuild from the output
            else:
                y_td = fused_layer_norm_affine(z_td, weight_d, bias_d, x_td.shape[1:], eps)
        return y_td, y_td

    return dropout_residual_layer_norm
