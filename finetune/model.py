"""The encoder with the published classification head: pooled states -> Dense -> tanh -> dropout -> Linear.

Names are those of a Hugging Face BertForSequenceClassification (`bert.pooler.dense`, `classifier`), around the
encoder's own. Shapes in names as in pretrain/model.py; b sequences, c classes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

import kernels
from data_prep.cli import InputError
from finetune.tasks import Pooling
from kernels.random import root_key
from pretrain.model import SITE_CLASSIFIER, Encoder, ModelConfig, Packed, initialize

PURPOSE_HEAD = 33  # of the seed's children, see kernels.random; fine-tuning has the numbers from 32


def pool(hidden_td: Tensor, batch: Packed, pooling: Pooling) -> Tensor:
    """One vector a sequence [b, d]: the state of [CLS], or the mean over all of its tokens, [CLS] and [SEP] among them.

    The mean over all tokens is what the published model's page computes; fp32 (fp64) whatever the states are.
    """
    if pooling == "cls":
        return hidden_td[batch.cu_seqlens[:-1]]
    lengths_b = batch.cu_seqlens.diff()
    owner_t = torch.repeat_interleave(
        torch.arange(len(lengths_b), device=hidden_td.device), lengths_b, output_size=len(hidden_td)
    )
    wide_td = hidden_td.to(torch.promote_types(hidden_td.dtype, torch.float32))
    sums_bd = wide_td.new_zeros(len(lengths_b), hidden_td.shape[1]).index_add(0, owner_t, wide_td)
    return sums_bd / lengths_b[:, None]


class Pooler(nn.Module):
    """tanh(Dense) of one vector a sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_bd: Tensor) -> Tensor:
        return torch.tanh(self.dense(x_bd))


class PooledEncoder(Encoder):
    """Token ids to one vector a sequence."""

    def __init__(self, config: ModelConfig, pooling: Pooling) -> None:
        super().__init__(config)
        self.pooler, self.pooling = Pooler(config), pooling

    def forward(self, batch: Packed) -> Tensor:  # type: ignore[override]  # the rows are those that it pools
        """[b, d], out of the pooler."""
        return self.pooler(self.embed(batch))

    def embed(self, batch: Packed) -> Tensor:
        """Pooled states [b, d], as they are before the pooler's dense layer.

        Of [CLS] alone, what comes after the last layer's attention is computed for one token a sequence: nothing needs the
        others.
        """
        if self.pooling == "mean":
            return pool(super().forward(batch), batch, "mean")
        return super().forward(batch, batch.cu_seqlens[:-1])


class Classifier(nn.Module):
    """Sequences to class scores, or to one number. Without dropout keys in the batch (evaluation) nothing is dropped."""

    def __init__(self, config: ModelConfig, classes: int, pooling: Pooling = "cls") -> None:
        super().__init__()
        self.bert = PooledEncoder(config, pooling)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.dropout_p = config.hidden_dropout_prob

    @property
    def outputs(self) -> int:
        return self.classifier.out_features

    def forward(self, batch: Packed) -> Tensor:
        """Logits, fp32 [b, c]."""
        pooled_bd = self.bert(batch)
        keys_t = batch.dropout_keys_t
        keys_b = None if keys_t is None else keys_t[batch.cu_seqlens[:-1]]
        return self.classifier(kernels.dropout(pooled_bd, self.dropout_p, keys_b, SITE_CLASSIFIER)).float()


def build(
    config: ModelConfig,
    classes: int,
    weights: dict[str, Tensor] | None,
    seed: int,
    where: str,
    pooling: Pooling = "cls",
) -> Classifier:
    """A classifier with a fresh head and the encoder's `weights`, or fresh ones (None), drawn from `seed`.

    The head depends on the seed and the sizes alone, so that a pre-trained and a fresh encoder of one seed start with
    the same head. `weights` are a state dict with the published names; parts other than the encoder are not used.

    Raises InputError naming `where` the weights come from and the tensor that is missing or has another shape.
    """
    model = Classifier(config, classes, pooling)
    initialize(model.bert, seed, config.initializer_range)
    head = nn.ModuleDict({"pooler": model.bert.pooler, "classifier": model.classifier})
    initialize(head, root_key(seed, PURPOSE_HEAD), config.initializer_range)
    if weights is None:
        return model
    for name, parameter in model.bert.named_parameters(prefix="bert"):
        if name.startswith("bert.pooler."):
            continue
        if name not in weights:
            raise InputError(f"{where}: has no tensor {name}; is it a DNABERT-2 checkpoint?")
        if weights[name].shape != parameter.shape:
            raise InputError(
                f"{where}: {name} is {list(weights[name].shape)}, its configuration says {list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(weights[name])
    return model


def encoder_sha256(model: Classifier) -> str:
    """Fingerprint of the encoder's weights, whatever file format they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.bert.state_dict(prefix="bert.").items()):
        if not name.startswith("bert.pooler."):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
