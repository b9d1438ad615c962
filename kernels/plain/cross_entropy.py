"""Cross entropy of the masked tokens, as a sum and counts: the caller divides by the count of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def masked_cross_entropy(
    logits_mv: Tensor, labels_m: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.masked_cross_entropy`. A label outside of the vocabulary is an IndexError, on a GPU a device assertion."""
    wide_mv = logits_mv.to(torch.promote_types(logits_mv.dtype, torch.float32))
    loss = F.cross_entropy(wide_mv, labels_m, ignore_index=ignore_index, reduction="sum")
    counted_m = labels_m != ignore_index
    right_m = (logits_mv.detach().argmax(-1) == labels_m) & counted_m
    return loss, torch.count_nonzero(counted_m), torch.count_nonzero(right_m)
