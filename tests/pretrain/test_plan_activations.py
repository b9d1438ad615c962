"""The plan's table of kept tensors, beside what autograd keeps."""

import pytest
import torch
from torch.autograd.profiler import profile

from kernels import choice
from pretrain.engine import DTYPES
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed
from pretrain.plan_activations import Kept, activations, terms

TORCH = dict.fromkeys(choice.OPERATIONS, "torch")
TRITON = dict.fromkeys(choice.OPERATIONS, "triton")
SHAPES = [  # vocabulary, hidden, layers, heads, features, sequences, length
    (256, 64, 2, 4, 96, 4, 32),
    (4096, 96, 3, 3, 256, 8, 64),
    (512, 128, 1, 2, 320, 3, 128),
]
DROPOUT = {"none": (0.0, 0.0), "hidden": (0.1, 0.0), "attention": (0.1, 0.1)}


def model_config(shape, dropout="hidden"):
    v, d, layers, heads, f, *_ = shape
    hidden, attention = DROPOUT[dropout]
    return ModelConfig(
        vocab_size=v,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=f,
        hidden_dropout_prob=hidden,
        attention_probs_dropout_prob=attention,
    )


def micro_batch(shape, dtype, dropout="hidden", checkpointing=False, recompute=False):
    """The model, its arguments, and the plan's words for their size."""
    config, sequences, length = model_config(shape, dropout), *shape[-2:]
    model = MaskedLanguageModel(config).to(DTYPES[dtype])
    model.bert.checkpointing = checkpointing
    for layer in model.bert.encoder.layer:
        layer.mlp.recompute = recompute
    tokens = sequences * length
    ids_t = torch.randint(5, config.vocab_size, (tokens,))
    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    index_m = torch.arange(round(0.15 * tokens)) * 3
    packed = Packed(ids_t, starts, length, torch.arange(tokens))
    size = {"sequences": sequences, "length": length, "masked": len(index_m)}
    return model, (packed, index_m, ids_t[index_m]), size


def kept_by_autograd(model, arguments):
    """Bytes of the distinct storages that are saved, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, or its address could be given again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*arguments)[0].backward()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_is_what_autograd_keeps(shape, dropout, dtype):
    model, arguments, size = micro_batch(shape, dtype, dropout)
    planned = activations(model.config, dtype, Kept(TORCH), **size).kept
    assert planned == pytest.approx(kept_by_autograd(model, arguments), rel=0.01)


@pytest.mark.parametrize("checkpointing, recompute", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_what_is_computed_again_is_not_kept(shape, dtype, checkpointing, recompute):
    # Hooks don't see what torch.utils.checkpoint holds; the allocator does.
    model, arguments, size = micro_batch(shape, dtype, checkpointing=checkpointing, recompute=recompute)
    planned = activations(model.config, dtype, Kept(TORCH, checkpointing, recompute), **size)
    model(*arguments)  # what is allocated once
    with profile(profile_memory=True, use_kineto=True) as forward:
        loss, _ = model(*arguments)
    with profile(profile_memory=True, use_kineto=True) as backward:
        loss.backward()
    kept, _ = allocated(forward)
    assert planned.kept == pytest.approx(kept, rel=0.05)
    _, added = allocated(backward)
    gradients = sum(p.nbytes for p in model.parameters())
    assert added < planned.transient + gradients


def allocated(profiled):
    """Bytes that stay, and bytes at most."""
    events = sorted((e.start_ns(), e.nbytes()) for e in profiled.kineto_results.events() if e.name() == "[memory]")
    total = most = 0
    for _, size in events:
        total += size
        most = max(most, total)
    return total, most


def test_each_way_to_keep_less_keeps_less():
    config, size = ModelConfig(), {"sequences": 128, "length": 128, "masked": 2400}

    def kept(*ways):
        return activations(config, "bf16", Kept(*ways), **size).kept

    assert kept(TRITON, True) < kept(TRITON, False, True) < kept(TRITON) < kept(TORCH)
    layers, tokens = config.num_hidden_layers - 1, 128 * 128
    # f values a token and layer; the last layer has the masked ones only.
    assert kept(TRITON) - kept(TRITON, False, True) == 2 * 3072 * (layers * tokens + 2400)


def test_the_published_layer_with_our_kernels():
    layer = [term for term in terms(ModelConfig(), "bf16", Kept(TRITON), 128) if term.part == "layer"]
    # Its input, q, k, v, output of attention, input of the feed-forward layer; gate, up, product; statistics.
    assert sum(term.bytes for term in layer) == 2 * (6 * 768 + 3 * 3072) + 4 * (12 + 2)
    assert {term.per for term in layer} == {"token"}
