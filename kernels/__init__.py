"""The operations of the model that are worth fusing, behind signatures that stay when the implementation changes.

Tokens of all sequences of a micro batch lie end to end (`_t`); `cu_seqlens` says where each sequence starts. Randomness
is drawn by key (`kernels.random`). What stands here is plain PyTorch: it defines what each operation means, runs
everywhere and is what faster implementations are tested against.
"""

from kernels.attention import alibi_slopes, attention
from kernels.cross_entropy import IGNORE_INDEX, masked_cross_entropy
from kernels.geglu import geglu
from kernels.layer_norm import dropout_residual_layer_norm
from kernels.random import dropout

__all__ = [
    "IGNORE_INDEX",
    "alibi_slopes",
    "attention",
    "dropout",
    "dropout_residual_layer_norm",
    "geglu",
    "masked_cross_entropy",
]
