"""The DNABERT-2 encoder and its masked-language-model head, unpadded throughout.

A post-LN BERT with ALiBi instead of position embeddings and a GEGLU feed-forward layer (Zhou et al., "DNABERT-2", ICLR
2024; the layout is MosaicBERT's). Module names are those of the published checkpoint, so its 142 state-dict keys are our
keys and there is no mapping between the two that could be wrong.

Shapes in names: t tokens of the whole micro batch, d hidden, h heads, f features of the feed-forward layer, v vocabulary,
m masked tokens, b sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from pretrain.onednn import linear


class ModelConfig(BaseModel):
    """Size and regularisation of the encoder. Keys are those of the published config.json; the defaults are its values."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(4096, ge=6, le=65536)  # tokens are stored as uint16; the first five are special
    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    type_vocab_size: int = Field(2, ge=1)
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1)
    layer_norm_eps: float = Field(1e-12, gt=0)
    initializer_range: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        return self


@dataclass(frozen=True)
class Packed:
    """One micro batch: the tokens of its sequences end to end, with [CLS] first and [SEP] last in each."""

    ids_t: Tensor  # int64 [t]
    cu_seqlens: Tensor  # int32 [b + 1], where each sequence starts
    max_seqlen: int
    dropout_keys_t: Tensor | None = None  # int64 [t]; None in evaluation
    token_types_t: Tensor | None = None  # int64 [t]; None means type 0 everywhere

    def to(self, device: torch.device) -> Packed:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return Packed(
            self.ids_t.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            move(self.dropout_keys_t),
            move(self.token_types_t),
        )

    def pin(self) -> Packed:
        """In memory from which a GPU copies while the CPU goes on."""
        return Packed(
            self.ids_t.pin_memory(),
            self.cu_seqlens.pin_memory(),
            self.max_seqlen,
            None if self.dropout_keys_t is None else self.dropout_keys_t.pin_memory(),
            None if self.token_types_t is None else self.token_types_t.pin_memory(),
        )


# Dropout sites: three a layer, after the embeddings' one. The numbers are part of what a run means.
SITE_EMBEDDINGS, SITE_CLASSIFIER, SITES_BEFORE_LAYERS, SITES_PER_LAYER = 0, 1, 8, 4
SITE_ATTENTION_WEIGHTS, SITE_ATTENTION_OUTPUT, SITE_FEED_FORWARD = 0, 1, 2


# The same hidden states twice, for a dense path and for the next residual sum; see `kernels.dropout_residual_layer_norm`.
Twice = tuple[Tensor, Tensor]


class LayerNorm(nn.Module):
    """Weights of a LayerNorm, with the dropout and the residual sum before it; see `kernels`."""

    def __init__(self, config: ModelConfig, site: int = 0, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps, self.site, self.dropout_p = config.layer_norm_eps, site, dropout_p

    def forward(self, x_td: Tensor, residual_td: Tensor | None, keys_t: Tensor | None) -> Twice:
        return kernels.dropout_residual_layer_norm(
            x_td,
            residual_td,
            self.weight,
            self.bias,
            self.eps,
            dropout_p=self.dropout_p,
            dropout_keys_t=keys_t,
            site=self.site,
        )


class Linear(nn.Linear):
    """A dense layer of [rows, in] matrices; with `onednn`, for fp32 on a CPU, by that (`pretrain/onednn.py`)."""

    onednn = False

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias) if self.onednn else super().forward(input)


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, batch: Packed) -> Tensor:
        types_t = torch.zeros_like(batch.ids_t) if batch.token_types_t is None else batch.token_types_t
        x_td, _ = self.LayerNorm(self.word_embeddings(batch.ids_t), self.token_type_embeddings(types_t), None)
        return kernels.dropout(x_td, self.dropout_p, batch.dropout_keys_t, SITE_EMBEDDINGS)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, first_site: int) -> None:
        super().__init__()
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.heads = config.num_attention_heads
        self.site, self.dropout_p = first_site + SITE_ATTENTION_WEIGHTS, config.attention_probs_dropout_prob

    def forward(self, x_td: Tensor, batch: Packed) -> Tensor:
        qkv_t3hd = self.Wqkv(x_td).view(len(x_td), 3, self.heads, x_td.shape[-1] // self.heads)
        out_thd = kernels.attention(
            qkv_t3hd,
            batch.cu_seqlens,
            batch.max_seqlen,
            dropout_p=self.dropout_p,
            dropout_keys_t=batch.dropout_keys_t,
            site=self.site,
        )
        return out_thd.flatten(1)


class DenseResidualNorm(nn.Module):
    """The attention block's output projection: LN(x + Drop(Dense(attention)))."""

    def __init__(self, config: ModelConfig, first_site: int) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config, first_site + SITE_ATTENTION_OUTPUT, config.hidden_dropout_prob)

    def forward(self, attended_td: Tensor, x_td: Tensor, keys_t: Tensor | None) -> Twice:
        return self.LayerNorm(self.dense(attended_td), x_td, keys_t)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, first_site: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, first_site)
        self.output = DenseResidualNorm(config, first_site)

    def forward(self, x: Twice, batch: Packed, rows: Tensor | None = None) -> Twice:
        dense_td, residual_td = x
        attended_td, keys_t = self.self(dense_td, batch), batch.dropout_keys_t
        if rows is not None:
            attended_td, residual_td = attended_td[rows], residual_td[rows]
            keys_t = None if keys_t is None else keys_t[rows]
        return self.output(attended_td, residual_td, keys_t)


class FeedForward(nn.Module):
    """LN(wo(Drop(gelu(gate) * up)) + x). The name of `layernorm` is lower case in the published checkpoint.

    With `recompute` the backward pass computes the GEGLU again instead of keeping it: f values a token less, for one more
    element-wise pass.
    """

    def __init__(self, config: ModelConfig, first_site: int) -> None:
        super().__init__()
        self.gated_layers = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = LayerNorm(config)
        self.site, self.dropout_p = first_site + SITE_FEED_FORWARD, config.hidden_dropout_prob
        self.recompute = False

    def forward(self, x: Twice, keys_t: Tensor | None) -> Twice:
        dense_td, residual_td = x
        gated_t2f = self.gated_layers(dense_td)
        if self.recompute and torch.is_grad_enabled():
            # Its recomputation ends where `wo` would keep its input: the product itself is not computed again.
            down_td = checkpoint(self._down, gated_t2f, keys_t, use_reentrant=False, preserve_rng_state=False)
        else:
            down_td = self._down(gated_t2f, keys_t)
        return self.layernorm(down_td, residual_td, None)

    def _down(self, gated_t2f: Tensor, keys_t: Tensor | None) -> Tensor:
        return self.wo(kernels.geglu(gated_t2f, dropout_p=self.dropout_p, dropout_keys_t=keys_t, site=self.site))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        first_site = SITES_BEFORE_LAYERS + SITES_PER_LAYER * number
        self.attention = Attention(config, first_site)
        self.mlp = FeedForward(config, first_site)

    def forward(self, x: Twice, batch: Packed, rows: Tensor | None = None) -> Twice:
        """All tokens attend; what comes after attention is computed at the tokens `rows` (int64 [m]), or at all."""
        keys_t = batch.dropout_keys_t
        keys_t = keys_t if rows is None or keys_t is None else keys_t[rows]
        return self.mlp(self.attention(x, batch, rows), keys_t)


class Layers(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(config, number) for number in range(config.num_hidden_layers)])


class Encoder(nn.Module):
    """Token ids to hidden states. With `checkpointing` a layer keeps its input only, and is computed again in the backward
    pass: dropout by key draws the same again, whatever happened in between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.checkpointing = False

    def forward(self, batch: Packed, rows: Tensor | None = None) -> Tensor:
        """Hidden states of the last layer, [t, d], or at the tokens `rows` (int64 [m]) only, [m, d].

        The latter are the same to rounding, for less: nothing needs what the last layer computes at other tokens after its
        attention. Of 12 layers, with 15 % of the tokens in `rows`, this saves 6 % of a step's products.
        """
        x_td = self.embeddings(batch)
        x = x_td, x_td
        last = len(self.encoder.layer) - 1
        for number, layer in enumerate(self.encoder.layer):
            of_layer = rows if number == last else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, batch, of_layer, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, batch, of_layer)
        return x[0]


class Transform(nn.Module):
    """The head's own layer before the decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config)

    def forward(self, x_md: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x_md)), None, None)[0]


class Predictions(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size)

    def forward(self, x_md: Tensor) -> Tensor:
        return self.decoder(self.transform(x_md))


class MaskedLanguageModelHead(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)


class MaskedLanguageModel(nn.Module):
    """Encoder and head. The decoder's matrix is the word embedding matrix; its bias is its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.cls = MaskedLanguageModelHead(config)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def logits(self, batch: Packed, index_m: Tensor) -> Tensor:
        """Scores over the vocabulary at the tokens `index_m` (int64 [m], positions in the micro batch): [m, v]."""
        return self.cls.predictions(self.bert(batch, index_m))

    def forward(self, batch: Packed, index_m: Tensor, labels_m: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Cross entropy of the masked tokens, summed (fp32 scalar), and how many were predicted right (int64 scalar).

        Without labels `logits`, for callers that have to go through DeepSpeed's engine: it calls this method alone.

        A micro batch without sequences or without masked tokens gives a loss of 0 whose backward pass still reaches every
        parameter, so that ranks with less work take part in every collective.
        """
        logits_mv = self.logits(batch, index_m)
        if labels_m is None:
            return logits_mv
        loss, _, right = kernels.masked_cross_entropy(logits_mv, labels_m)
        return loss, right


def set_recomputation(encoder: Encoder, layers: bool, geglu: bool) -> None:
    """What the backward pass computes again instead of keeping it: whole layers, the GEGLU inside them. Gradients are the
    same to the last bit."""
    encoder.checkpointing = layers
    for module in encoder.modules():
        if isinstance(module, FeedForward):
            module.recompute = geglu


def set_onednn(model: nn.Module, wanted: bool) -> None:
    """Whether the linear layers of a model compute by oneDNN."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.onednn = wanted


def initial_values(shapes: Mapping[str, tuple[int, ...]], seed: int, std: float) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 start value of one parameter after another: Normal(0, std) matrices, zero biases, unit LayerNorms.

    `shapes` has each parameter once, in the order of the module tree, so the result depends on nothing but the seed and the
    sizes. Only one value exists at a time: no process has to hold a whole model.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if len(shape) >= 2:
            yield name, torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        else:
            yield name, torch.full(shape, float(name.lower().endswith("layernorm.weight")), dtype=torch.float32)


@torch.no_grad()
def initialize(model: nn.Module, seed: int, std: float) -> None:
    """Give a model its `initial_values`."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values({name: tuple(p.shape) for name, p in parameters.items()}, seed, std):
        parameters[name].copy_(value)


def parameter_count(config: ModelConfig) -> int:
    """Number of distinct parameters of the masked language model; 117,074,176 for the published size."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaskedLanguageModel(config).parameters())
