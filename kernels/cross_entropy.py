"""Cross entropy of the masked tokens, as a sum and a count: the caller divides by the count of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def masked_cross_entropy(logits_mv: Tensor, labels_m: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Sum over the rows whose label is not `ignore_index`, and the number of such rows.

    Args:
        logits_mv: [rows, vocabulary], any float dtype; rows were gathered at the masked positions.
        labels_m: int64 [rows].

    Returns:
        (fp32 scalar, or fp64 for fp64 input; int64 scalar). With no row the sum is 0 and its gradient is 0.
    """
    wide_mv = logits_mv.to(torch.promote_types(logits_mv.dtype, torch.float32))
    loss = F.cross_entropy(wide_mv, labels_m, ignore_index=ignore_index, reduction="sum")
    return loss, torch.count_nonzero(labels_m != ignore_index)
