"""What a user would train otherwise: Hugging Face's BERT of the same size, on the same batches, padded and ready-made.

It has the same vocabulary, layers, hidden size, heads, dtype, SDPA and fused AdamW. BERT's MLP has two matrices where
GEGLU has three, so it gets 1.5 times the intermediate size: the matrix FLOPs of a layer are equal. `huggingface` is
BertForMaskedLM as everyone runs it, with logits at every token; `huggingface_masked_logits` has its head on the predicted
tokens only, which transformers leaves to the user; `_compiled` is either under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data_prep.cli import InputError
from data_prep.dataset import SPECIALS
from pretrain.loader import MaskedBatch
from pretrain.model import ModelConfig

PAD = SPECIALS.index("[PAD]")

Padded = tuple[Tensor, Tensor, Tensor]  # ids, attention mask, labels (-100 where nothing is predicted), each int64 [b, s]
NAMES = ("huggingface", "huggingface_masked_logits", "huggingface_compiled", "huggingface_masked_logits_compiled")


def pad(batch: MaskedBatch, device: torch.device) -> Padded:
    """The same sequences with the same masks as rows of equal length."""
    starts, lengths = batch.packed.cu_seqlens[:-1].long(), batch.packed.cu_seqlens.diff().long()
    labels_t = torch.full_like(batch.packed.ids_t, -100)
    labels_t[batch.index_m] = batch.labels_m
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    source = (starts[:, None] + torch.arange(inside.shape[1])).clamp(max=len(labels_t) - 1)
    ids_bs = batch.packed.ids_t[source].masked_fill(~inside, PAD)
    labels_bs = labels_t[source].masked_fill(~inside, -100)
    return ids_bs.to(device), inside.long().to(device), labels_bs.to(device)


def build(config: ModelConfig, longest: int, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' BertForMaskedLM with random weights; imported here, so that nothing else needs transformers."""
    try:
        from transformers import AutoModelForMaskedLM, BertConfig
    except ImportError:
        raise InputError(
            "transformers is not installed, and it is what this bench compares with; "
            'install the extra "test": pip install -e ".[test]"'
        ) from None
    settings = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=round(1.5 * config.intermediate_size),
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        max_position_embeddings=max(512, longest),
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=PAD,
    )
    return AutoModelForMaskedLM.from_config(settings, attn_implementation="sdpa").to(device=device, dtype=dtype).train()


def stepper(name: str, model: Any, masters: bool) -> Callable[[Sequence[Padded]], None]:
    """A whole training step on padded micro batches, for one of NAMES.

    Args:
        masters: keep fp32 weights for AdamW beside the model's of fewer bits, as DeepSpeed does for ours.
    """
    weights = list(model.parameters())
    wide = [weight.detach().float().requires_grad_() for weight in weights] if masters else weights
    optimizer = torch.optim.AdamW(wide, lr=1e-4, fused=True)
    loss_of = _masked_loss if "masked_logits" in name else _loss
    if name.endswith("_compiled"):
        loss_of = torch.compile(loss_of, dynamic=True)

    def step(micro_batches: Sequence[Padded]) -> None:
        for padded in micro_batches:
            (loss_of(model, *padded) / len(micro_batches)).backward()
        if masters:
            for master, weight in zip(wide, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        if masters:
            torch._foreach_copy_([weight.detach() for weight in weights], wide)

    return step


def _loss(model: Any, ids_bs: Tensor, attention_mask_bs: Tensor, labels_bs: Tensor) -> Tensor:
    """As in transformers' examples."""
    loss: Tensor = model(input_ids=ids_bs, attention_mask=attention_mask_bs, labels=labels_bs).loss
    return loss


def _masked_loss(model: Any, ids_bs: Tensor, attention_mask_bs: Tensor, labels_bs: Tensor) -> Tensor:
    states_td = model.bert(input_ids=ids_bs, attention_mask=attention_mask_bs).last_hidden_state.flatten(0, 1)
    labels_t = labels_bs.flatten()
    index_m = (labels_t >= 0).nonzero().flatten()
    return torch.nn.functional.cross_entropy(model.cls(states_td[index_m]), labels_t[index_m])


def flops(config: ModelConfig, counted: dict[str, int], logits_everywhere: bool) -> int:
    """Matrix FLOPs of a step on real tokens: as `flops.training_flops`, with the whole last layer, which BERT computes."""
    d, f, tokens = config.hidden_size, config.intermediate_size, counted["tokens"]
    layer = tokens * (4 * d * d + 3 * d * f) + 2 * counted["squared_lengths"] * d
    logits = tokens if logits_everywhere else counted["masked"]
    return 6 * (config.num_hidden_layers * layer + logits * (d * d + d * config.vocab_size))
