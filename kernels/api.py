"""The operations of the model that are worth fusing: what they mean, their arguments, and the checks of these.

Tokens of all sequences of a micro batch lie end to end (`_t`); `cu_seqlens` says where each sequence starts. Randomness is
drawn by key (`kernels.random`), so every implementation drops the same elements. Who computes an operation is chosen once
for the process (`kernels.choice`).
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from kernels.choice import chosen
from kernels.plain.attention import MAX_SEQUENCE
from kernels.plain.cross_entropy import IGNORE_INDEX
from kernels.random import drop_threshold

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def attention(
    qkv_t3hd: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    dropout_keys_t: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) - slope_h |i - j|) v for every sequence and head: bidirectional attention with ALiBi.

    Args:
        qkv_t3hd: [tokens, 3, heads, head dim], any float dtype; queries, keys, values in this order.
        cu_seqlens: int32 [sequences + 1], where each sequence starts; the first is 0, the last `tokens`.
        max_seqlen: the longest sequence in tokens (or more), at most MAX_SEQUENCE.
        dropout_p: probability of dropping a softmax weight.
        dropout_keys_t: int64 [tokens], the key of each query token; None means no dropout.
        site: dropout site; the weight of query token i, head h, key j is element h * MAX_SEQUENCE + j of token i.

    Returns:
        [tokens, heads, head dim] in the dtype of `qkv_t3hd`. Scores, bias and softmax are fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a sequence longer than MAX_SEQUENCE, or `cu_seqlens` that do
            not cover the tokens. On a GPU the last is found by the device, as a failed assertion, without waiting for it;
            under torch.compile it is not looked for.
    """
    if qkv_t3hd.ndim != 4 or qkv_t3hd.shape[1] != 3:
        raise ValueError(f"attention: qkv is {list(qkv_t3hd.shape)}, expected [tokens, 3, heads, head dim]")
    if max_seqlen > MAX_SEQUENCE:
        raise ValueError(f"attention: a sequence of {max_seqlen} tokens is over the limit of {MAX_SEQUENCE}")
    _check_float("attention", "qkv", qkv_t3hd)
    _check_dropout("attention", qkv_t3hd, dropout_p, dropout_keys_t)
    _check_sequences(cu_seqlens, max_seqlen, qkv_t3hd)
    return chosen("attention", qkv_t3hd)(
        qkv_t3hd, cu_seqlens, max_seqlen, dropout_p=dropout_p, dropout_keys_t=dropout_keys_t, site=site
    )


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
    """LayerNorm(Dropout(x) + residual) over the last axis, the biased variance as in torch: the end of a post-LN half block.

    Args:
        x_td: [tokens, hidden], any float dtype.
        residual_td: [tokens, hidden], any float dtype, or None for no residual.
        weight_d, bias_d: [hidden], any float dtype.
        eps: added to the variance; 1e-12 in this model family, which fp32 statistics need no more than.
        dropout_p, dropout_keys_t, site: as in `dropout`.

    Returns:
        The same [tokens, hidden] twice, in the dtype of x: one for the dense path, one for the next residual sum. The
        fused backward pass takes their two gradients apart, so no pass of its own adds them. Sum and statistics are fp32
        (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; for Triton also a hidden size that is no multiple of 64.
    """
    name = "dropout_residual_layer_norm"
    if x_td.ndim != 2 or (residual_td is not None and residual_td.shape != x_td.shape):
        other = "none" if residual_td is None else list(residual_td.shape)
        raise ValueError(f"{name}: x is {list(x_td.shape)}, residual {other}; expected [tokens, hidden] for both")
    if weight_d.shape != x_td.shape[1:] or bias_d.shape != x_td.shape[1:]:
        raise ValueError(
            f"{name}: weight is {list(weight_d.shape)}, bias {list(bias_d.shape)}; x has rows of {x_td.shape[1]}"
        )
    for label, tensor in (("x", x_td), ("residual", residual_td), ("weight", weight_d), ("bias", bias_d)):
        if tensor is not None:
            _check_float(name, label, tensor, x_td.device)
    _check_dropout(name, x_td, dropout_p, dropout_keys_t)
    return chosen("layer_norm", x_td)(
        x_td, residual_td, weight_d, bias_d, eps, dropout_p=dropout_p, dropout_keys_t=dropout_keys_t, site=site
    )


def geglu(x_t2f: Tensor, *, dropout_p: float = 0.0, dropout_keys_t: Tensor | None = None, site: int = 0) -> Tensor:
    """Dropout(gelu(gate) * up), gelu exact (erf): Shazeer, "GLU variants improve transformer", 2020, GEGLU.

    Args:
        x_t2f: [tokens, 2 * features], any float dtype; the first half is the gate.
        dropout_p, dropout_keys_t, site: as in `dropout`.

    Returns:
        [tokens, features] in the dtype of x; computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x_t2f.ndim != 2 or x_t2f.shape[1] % 2:
        raise ValueError(f"geglu: x is {list(x_t2f.shape)}, expected [tokens, 2 * features]")
    _check_float("geglu", "x", x_t2f)
    _check_dropout("geglu", x_t2f, dropout_p, dropout_keys_t)
    return chosen("geglu", x_t2f)(x_t2f, dropout_p=dropout_p, dropout_keys_t=dropout_keys_t, site=site)


def masked_cross_entropy(
    logits_mv: Tensor, labels_m: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy summed over the rows whose label is not `ignore_index`: the caller divides by the global batch's count.

    Args:
        logits_mv: [rows, vocabulary], any float dtype; rows were gathered at the masked positions. Triton's backward pass
            writes their gradient over them (over a copy, where they are a leaf): they are not to be read after it, no other
            loss may need them, and it can be run once.
        labels_m: int64 [rows]. One outside of the vocabulary is an IndexError in PyTorch; with Triton the loss is NaN.

    Returns:
        (the sum, an fp32 scalar, fp64 for fp64 input; the number of such rows, int64; in how many of them the label has the
        greatest logit, the first of equal ones, int64). With no row the sum is 0 and its gradient is 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if logits_mv.ndim != 2 or labels_m.shape != logits_mv.shape[:1]:
        raise ValueError(
            f"masked_cross_entropy: logits are {list(logits_mv.shape)}, labels {list(labels_m.shape)}; "
            "expected [rows, vocabulary] and [rows]"
        )
    if labels_m.dtype != torch.int64 or labels_m.device != logits_mv.device:
        raise ValueError(
            f"masked_cross_entropy: labels are {labels_m.dtype} on {labels_m.device}; expected int64 on {logits_mv.device}"
        )
    _check_float("masked_cross_entropy", "logits", logits_mv)
    return chosen("cross_entropy", logits_mv)(logits_mv, labels_m, ignore_index)


def dropout(x_td: Tensor, p: float, keys_t: Tensor | None, site: int) -> Tensor:
    """Dropout by key; kept elements are divided by the probability with which they are really kept.

    Args:
        x_td: [tokens, width], any float dtype.
        p: probability of dropping an element; 0 means no dropout.
        keys_t: int64 [tokens], one key a token; None means no dropout (evaluation).
        site: number of the place in the model; different sites draw independent masks (`kernels.random.keep_mask`).

    Returns:
        [tokens, width] in the dtype of x; x itself where nothing is dropped.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x_td.ndim != 2:
        raise ValueError(f"dropout: x is {list(x_td.shape)}, expected [tokens, width]")
    if p == 0.0 or keys_t is None:
        return x_td
    _check_float("dropout", "x", x_td)
    _check_dropout("dropout", x_td, p, keys_t)
    return chosen("dropout", x_td)(x_td, p, keys_t, site)


def _check_float(operation: str, name: str, x: Tensor, device: torch.device | None = None) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{operation}: {name} is {x.dtype}, expected a float dtype: bf16, fp16, fp32 or fp64")
    if device is not None and x.device != device:
        raise ValueError(f"{operation}: {name} is on {x.device}, x on {device}")


def _check_dropout(operation: str, x: Tensor, p: float, keys_t: Tensor | None) -> None:
    drop_threshold(p)  # raises where p is no probability
    if keys_t is None:
        return
    if keys_t.shape != x.shape[:1] or keys_t.dtype != torch.int64 or keys_t.device != x.device:
        raise ValueError(
            f"{operation}: dropout keys are {keys_t.dtype} {list(keys_t.shape)} on {keys_t.device}; "
            f"expected int64 [{x.shape[0]}] on {x.device}"
        )


# The `cu_seqlens` that were looked at last, its version, and what it was found to fit: all layers of a model share one.
_checked: tuple[weakref.ref[Tensor], tuple[int, int, int]] | None = None


def _check_sequences(cu_seqlens: Tensor, max_seqlen: int, qkv_t3hd: Tensor) -> None:
    global _checked
    tokens = qkv_t3hd.shape[0]
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv_t3hd.device:
        raise ValueError(
            f"attention: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}; "
            f"expected int32 [sequences + 1] on {qkv_t3hd.device}"
        )
    if cu_seqlens.numel() == 0:
        raise ValueError("attention: cu_seqlens is empty; it has one entry more than there are sequences")
    if torch.compiler.is_compiling() or cu_seqlens.device.type == "meta":
        return
    facts = None if cu_seqlens.is_inference() else (cu_seqlens._version, tokens, max_seqlen)  # those don't count changes
    if facts is not None and _checked is not None and _checked[0]() is cu_seqlens and _checked[1] == facts:
        return
    lengths = cu_seqlens.diff()
    fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (lengths >= 0).all() & (lengths <= max_seqlen).all()
    message = (
        f"attention: cu_seqlens does not fit: it must rise from 0 to the {tokens} tokens in steps of at most {max_seqlen}"
    )
    if cu_seqlens.device.type == "cpu":
        if not fits:
            raise ValueError(message)
    else:
        torch._assert_async(fits, message)
    _checked = None if facts is None else (weakref.ref(cu_seqlens), facts)
