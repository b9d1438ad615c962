"""Bytes that the forward pass keeps for the backward pass, as a table of terms, and what the backward pass adds.

The terms are those of eager execution; torch.compile may keep less, so for it they are an upper bound. Tests compare their
sum with what `torch.autograd.graph.saved_tensors_hooks` sees, each storage once and parameters left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pretrain.engine import DTYPES
from pretrain.model import ModelConfig

WIDE = 4  # bytes of fp32, in which statistics, and PyTorch's twins of the kernels, compute


Per = Literal["token", "masked token", "micro batch"]
Part = Literal["embeddings", "layer", "last layer", "head"]


@dataclass(frozen=True)
class Term:
    """One tensor that is kept, `bytes` for each unit of `per`. Part "layer" stands for every layer but the last."""

    part: Part
    what: str
    bytes: float
    per: Per = "token"
    is_layer_input: bool = False  # with activation checkpointing a layer keeps this alone


@dataclass(frozen=True)
class Kept:
    """What decides which tensors are kept: all of it can change without changing the run's result."""

    kernels: Mapping[str, str]  # `triton` or another name by operation, as in `kernels.choice`; others count as PyTorch
    checkpointing: bool = False  # train.activation_checkpointing
    recompute_geglu: bool = False  # train.recompute_geglu


def terms(model: ModelConfig, dtype: str, kept: Kept, length: int) -> list[Term]:
    """What the forward pass keeps, `kept.checkpointing` aside.

    Args:
        model: sizes and dropout.
        dtype: of weights and activations, `bf16` or `fp32`.
        kept: who computes, and what is computed again.
        length: tokens of a sequence; all are equally long (PyTorch's attention pads copies of others).
    """
    return [term for term in _terms(model, dtype, kept, length) if term.bytes]


def _terms(model: ModelConfig, dtype: str, kept: Kept, length: int) -> Iterator[Term]:
    d, item = model.hidden_size, DTYPES[dtype].itemsize
    dropped = model.hidden_dropout_prob > 0
    fused_norm, fused_dropout = (kept.kernels[operation] == "triton" for operation in ("layer_norm", "dropout"))

    yield Term("embeddings", "ids, types, dropout keys", 24)
    yield from _layer_norm("embeddings", "LayerNorm", "token", d, fused_norm, False)
    if dropped and fused_norm:
        yield Term("embeddings", "LayerNorm: output", item * d)
    if dropped and not fused_dropout:
        yield Term("embeddings", "dropout factors", WIDE * d)

    yield from _layer("layer", "token", model, item, kept, length)
    yield from _layer("last layer", "masked token", model, item, kept, length)

    yield Term("head", "positions, labels, dropout keys", 24, "masked token")
    yield Term("head", "transform: input, before gelu, after LayerNorm", 3 * item * d, "masked token")
    yield from _layer_norm("head", "transform: LayerNorm", "masked token", d, fused_norm, False)
    if kept.kernels["cross_entropy"] == "triton":
        yield Term("head", "logits", item * model.vocab_size, "masked token")
    else:
        yield Term("head", "log softmax in fp32", WIDE * model.vocab_size, "masked token")


def _layer(part: Part, per: Per, model: ModelConfig, item: int, kept: Kept, length: int) -> Iterator[Term]:
    """All tokens attend; what comes after is computed for units of `per`."""
    d, f, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    dropped = model.hidden_dropout_prob > 0
    fused = {operation: name == "triton" for operation, name in kept.kernels.items()}
    yield Term(part, "input", item * d, is_layer_input=True)
    if fused["attention"]:
        yield Term(part, "attention: q, k, v, output", 4 * item * d)
        yield Term(part, "attention: log of sums", WIDE * heads)
        if per != "token":
            yield Term(part, "attention: output", item * d, per)
    else:
        yield Term(part, "attention: q, k, v in fp32", 3 * WIDE * d)
        own_output = per != "token" or item != WIDE  # PyTorch's attention computes in fp32
        if model.attention_probs_dropout_prob == 0:
            yield Term(part, "attention: log of sums, output in fp32", WIDE * (heads + d))
            yield Term(part, "attention: ALiBi", WIDE * heads * length**2, "micro batch")
        else:
            yield Term(part, "attention: weights, after dropout too, and its mask", (2 * WIDE + 1) * heads * length)
            own_output = True
        if own_output:
            yield Term(part, "attention: output", item * d, per)
    yield from _layer_norm(part, "attention: LayerNorm", per, d, fused["layer_norm"], dropped)
    yield Term(part, "feed-forward: input", item * d, per)
    for what, size, again in _feed_forward(f, item, fused["geglu"], dropped):
        if not (again and kept.recompute_geglu):
            yield Term(part, f"feed-forward: {what}", size, per)
    if kept.recompute_geglu and not fused["geglu"]:
        yield Term(part, "feed-forward: gate and up", 2 * item * f, per)
    yield from _layer_norm(part, "feed-forward: LayerNorm", per, d, fused["layer_norm"], False)


def _feed_forward(f: int, item: int, fused: bool, dropped: bool) -> Iterator[tuple[str, int, bool]]:
    """Name, bytes, and whether `recompute_geglu` computes it again."""
    if fused:
        yield "gate and up", 2 * item * f, False
    else:
        yield "gate and up in fp32, gelu", 3 * WIDE * f, True
        yield "dropout factors", WIDE * f * dropped, True
    yield "product", item * f, True


def _layer_norm(part: Part, name: str, per: Per, d: int, fused: bool, dropout: bool) -> Iterator[Term]:
    if fused:  # goes back from its output, which what follows keeps anyway
        yield Term(part, f"{name} statistics", WIDE, per)
    else:
        yield Term(part, f"{name} input, statistics", WIDE * (d + 2), per)
        yield Term(part, f"{name} dropout factors", WIDE * d * dropout, per)


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro batch."""

    embeddings: int
    layers: int
    head: int
    transient: int  # estimate: what the backward pass adds where it adds most, recomputed activations among it

    @property
    def kept(self) -> int:
        return self.embeddings + self.layers + self.head

    @property
    def peak(self) -> int:
        return self.kept + self.transient


def activations(model: ModelConfig, dtype: str, kept: Kept, *, sequences: int, length: int, masked: float) -> Activations:
    """Bytes that a micro batch of `sequences` x `length` tokens, `masked` of them predicted, needs beside the state."""
    units = {"token": sequences * length, "masked token": masked, "micro batch": 1}
    parts = dict.fromkeys(("embeddings", "layer", "last layer", "head"), 0.0)
    inputs = 0.0
    for term in terms(model, dtype, kept, length):
        amount = term.bytes * units[term.per]
        parts[term.part] += amount
        if term.part == "layer" and term.is_layer_input:
            inputs += amount
    item, tokens, layers = DTYPES[dtype].itemsize, units["token"], model.num_hidden_layers
    fused = kept.kernels["geglu"] == "triton"
    wide = item if fused else WIDE
    # The feed-forward layer's backward pass: gradients of product, gate and up, and of its input and output.
    in_layer = tokens * (4 * wide * model.intermediate_size + 4 * item * model.hidden_size)
    if kept.checkpointing:
        in_layer += parts["layer"] - inputs
    if kept.recompute_geglu:
        dropped = model.hidden_dropout_prob > 0
        in_layer += tokens * sum(n for _, n, again in _feed_forward(model.intermediate_size, item, fused, dropped) if again)
    in_head = 0.0
    if kept.kernels["cross_entropy"] != "triton":  # Triton writes the gradient over the logits
        in_head = masked * model.vocab_size * (WIDE + (item if item != WIDE else 0))
    of_layers = layers * inputs if kept.checkpointing else (layers - 1) * parts["layer"] + parts["last layer"]
    return Activations(round(parts["embeddings"]), round(of_layers), round(parts["head"]), round(max(in_layer, in_head)))
