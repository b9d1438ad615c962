"""fp32 products of linear layers by oneDNN, for CPUs where it is faster than the BLAS that torch was built with.

torch multiplies fp32 matrices by its BLAS, mostly MKL, which does not do its best on CPUs of other makers; oneDNN comes with
torch too, which calls it for bf16. There is no public switch for fp32: `mkldnn::_linear_pointwise` is what torch.compile
calls for weights that don't change. So a trial comes first. Gradients of weights stay with the BLAS: for most of their
shapes it is the faster one, and for others what oneDNN wins is lost again in transposing.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-5  # of the trial: sums of 512 products in another order


@torch.library.custom_op("dnabert2::onednn_linear", mutates_args=())
def linear(x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of fp32 matrices: [t, k] and [n, k] to [t, n]."""
    if len(x_tk) == 0:
        return x_tk.new_empty(0, len(weight_nk))
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x_tk, weight_nk, bias_n, "none", [], ""))


@linear.register_fake
def _empty(x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:
    return x_tk.new_empty(x_tk.shape[0], weight_nk.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_tk, weight_nk, _ = inputs
    ctx.save_for_backward(x_tk, weight_nk)


def _gradient(ctx: Any, grad_tn: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_tk, weight_nk = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    return (
        linear(grad_tn, weight_nk.t(), None) if of_x else None,
        grad_tn.t() @ x_tk if of_weight else None,
        grad_tn.sum(0) if of_bias else None,
    )


linear.register_autograd(_gradient, setup_context=_setup_context)


def obstacle(device: torch.device) -> str | None:
    """Why oneDNN can't compute here, or None, after a trial against torch's own products."""
    if device.type != "cpu":
        return "it computes on CPUs"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    shapes = (37, 512), (96, 512), (96,), (37, 96)
    x_tk, weight_nk, bias_n, grad_tn = (torch.randn(shape, generator=generator) for shape in shapes)
    results = []
    try:
        for product in (F.linear, linear):
            leaves = [tensor.clone().requires_grad_() for tensor in (x_tk, weight_nk, bias_n)]
            out_tn = product(*leaves)
            results.append([out_tn.detach(), *torch.autograd.grad(out_tn, leaves, grad_tn)])
    except Exception as error:  # what a private operation does in another torch is not known
        first = str(error).strip().partition("\n")[0]
        return f"torch {torch.__version__} has it in another way ({type(error).__name__}: {first})"
    off = max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
    return None if off <= TOLERANCE else f"its products are off by {off:.1e}, more than {TOLERANCE:.0e}"
