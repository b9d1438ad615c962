"""The operations of the model that are worth fusing, behind signatures that stay when the implementation changes.

`kernels.api` says what each means; `kernels.plain` defines them in PyTorch, `kernels.fused` has them as Triton kernels, and
`kernels.choice` decides between the two (and NVIDIA's apex) once a process.
"""

from kernels.api import attention, dropout, dropout_residual_layer_norm, geglu, masked_cross_entropy
from kernels.choice import Sizes, Unavailable, choose, using
from kernels.plain.attention import MAX_SEQUENCE, alibi_slopes
from kernels.plain.cross_entropy import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "MAX_SEQUENCE",
    "Sizes",
    "Unavailable",
    "alibi_slopes",
    "attention",
    "choose",
    "dropout",
    "dropout_residual_layer_norm",
    "geglu",
    "masked_cross_entropy",
    "using",
]
