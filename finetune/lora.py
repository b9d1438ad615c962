"""Low-rank updates of the encoder's matrices by `peft` (Hu et al., "LoRA", 2022); pooler and classifier are trained whole.

The names that circulate for other models (query, value) match nothing here, and a library that then trains the classifier
alone says so in no table: how many matrices were wrapped is checked.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from data_prep.cli import InputError, log
from finetune.model import Classifier
from finetune.tasks import Settings

TARGETS = ("Wqkv", "gated_layers", "wo")  # of every layer: attention's input, both matrices of the GEGLU


def add_lora(model: Classifier, settings: Settings, seed: int) -> Any:
    """Wrap the matrices in place; of the encoder only the updates require gradients from here on.

    The start of the updates is drawn from `seed`. Their dropout is torch's own, not keyed: it is the same on every run with
    one device, seed and library, and not across micro batches as the model's is.
    Returns peft's tuner, for `merge_lora`. Raises InputError where peft is missing, RuntimeError for a layer not wrapped.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer, LoraModel
    except ImportError as error:
        raise InputError(f'--method lora needs peft ({error}): pip install -e ".[lora]"') from None
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=list(TARGETS),
        bias="none",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about models of transformers
        tuner = LoraModel(model, config, "default")
    wrapped = sum(isinstance(module, LoraLayer) for module in model.modules())
    expected = len(TARGETS) * len(model.bert.encoder.layer)
    if wrapped != expected:
        raise RuntimeError(f"LoRA wrapped {wrapped} of {expected} matrices ({', '.join(TARGETS)} of each layer)")
    for head in (model.bert.pooler, model.classifier):
        head.requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log(
        f"LoRA: {wrapped} matrices wrapped, {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained"
    )
    return tuner


def merge_lora(tuner: Any) -> nn.Module:
    """The model with the updates added to its matrices, and without peft."""
    model: nn.Module = tuner.merge_and_unload()
    return model
