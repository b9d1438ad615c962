"""The encoder with the published classification head: [CLS] -> Dense -> tanh -> dropout -> Linear.

Names are those of a Hugging Face BertForSequenceClassification (`bert.pooler.dense`, `classifier`), around the
encoder's own. Shapes in names as in pretrain/model.py; b sequences, c classes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

import kernels
from data_prep.cli import InputError
from kernels.random import root_key
from pretrain.model import SITE_CLASSIFIER, Encoder, ModelConfig, Packed, initialize

PURPOSE_HEAD = 33  # of the seed's children, see kernels.random; fine-tuning has the numbers from 32


class Pooler(nn.Module):
    """tanh(Dense) of the first token of each sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_bd: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_bd))


class PooledEncoder(Encoder):
    """Token ids to one vector a sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)

    def forward(self, batch: Packed) -> Tensor:
        """Pooled [CLS] states, [b, d]."""
        hidden_td: Tensor = super().forward(batch)
        return self.pooler(hidden_td[batch.cu_seqlens[:-1]])


class Classifier(nn.Module):
    """Sequences to class scores. Without dropout keys in the batch (evaluation) nothing is dropped."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.bert = PooledEncoder(config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, batch: Packed) -> Tensor:
        """Logits, fp32 [b, c]."""
        pooled_bd = self.bert(batch)
        keys_t = batch.dropout_keys_t
        keys_b = None if keys_t is None else keys_t[batch.cu_seqlens[:-1]]
        return self.classifier(kernels.dropout(pooled_bd, self.dropout_p, keys_b, SITE_CLASSIFIER)).float()


def build(config: ModelConfig, classes: int, weights: dict[str, Tensor] | None, seed: int, where: str) -> Classifier:
    """A classifier with a fresh head and the encoder's `weights`, or fresh ones (None), drawn from `seed`.

    The head depends on the seed and the sizes alone, so that a pre-trained and a fresh encoder of one seed start with
    the same head. `weights` are a state dict with the published names; parts other than the encoder are not used.

    Raises InputError naming `where` the weights come from and the tensor that is missing or has another shape.
    """
    model = Classifier(config, classes)
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
