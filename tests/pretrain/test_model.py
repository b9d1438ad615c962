"""The model: its published shape, and that a sequence's result depends on nothing but the sequence and its keys."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from kernels.random import fork
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize, parameter_count

# Name -> shape in the published checkpoint, as its file lists them; I stands for 0 to 11.
PUBLISHED = {
    "bert.embeddings.word_embeddings.weight": (4096, 768),
    "bert.embeddings.token_type_embeddings.weight": (2, 768),
    "bert.embeddings.LayerNorm.weight": (768,),
    "bert.embeddings.LayerNorm.bias": (768,),
    "bert.encoder.layer.I.attention.self.Wqkv.weight": (2304, 768),
    "bert.encoder.layer.I.attention.self.Wqkv.bias": (2304,),
    "bert.encoder.layer.I.attention.output.dense.weight": (768, 768),
    "bert.encoder.layer.I.attention.output.dense.bias": (768,),
    "bert.encoder.layer.I.attention.output.LayerNorm.weight": (768,),
    "bert.encoder.layer.I.attention.output.LayerNorm.bias": (768,),
    "bert.encoder.layer.I.mlp.gated_layers.weight": (6144, 768),
    "bert.encoder.layer.I.mlp.wo.weight": (768, 3072),
    "bert.encoder.layer.I.mlp.wo.bias": (768,),
    "bert.encoder.layer.I.mlp.layernorm.weight": (768,),
    "bert.encoder.layer.I.mlp.layernorm.bias": (768,),
    "cls.predictions.transform.dense.weight": (768, 768),
    "cls.predictions.transform.dense.bias": (768,),
    "cls.predictions.transform.LayerNorm.weight": (768,),
    "cls.predictions.transform.LayerNorm.bias": (768,),
    "cls.predictions.decoder.weight": (4096, 768),
    "cls.predictions.decoder.bias": (4096,),
}
SMALL = ModelConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20)
LENGTHS = [7, 1, 12, 3]


def test_the_published_size():
    assert parameter_count(ModelConfig()) == 117_074_176


def test_the_published_keys_and_shapes():
    expected = {name.replace("layer.I.", f"layer.{i}."): shape for name, shape in PUBLISHED.items() for i in range(12)}
    with torch.device("meta"):
        model = MaskedLanguageModel(ModelConfig())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert len(expected) == 142
    assert len(list(model.parameters())) == 141  # the decoder's matrix is the embeddings'
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(size for name, size in sizes.items() if name.startswith("bert.encoder.layer.0.")) == 9_444_096
    assert sum(size for name, size in sizes.items() if name.startswith("bert.embeddings.")) == 3_148_800
    assert sum(size for name, size in sizes.items() if name.startswith("cls.")) == 596_224


def test_bad_configurations_are_refused():
    with pytest.raises(ValidationError, match="not a multiple"):
        ModelConfig(hidden_size=100, num_attention_heads=3)
    with pytest.raises(ValidationError, match="hiden_size"):
        ModelConfig(hiden_size=96)


def build(config=SMALL, dtype=torch.float64):
    """Weights large enough for every part of the model to matter to the output."""
    model = MaskedLanguageModel(config)
    initialize(model, 0, 0.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def sequences(lengths=LENGTHS, with_keys=False):
    """Per sequence: ids, token types, dropout keys; keys depend on the sequence's number only."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, SMALL.vocab_size, (n,), generator=generator) for n in lengths]
    types = [torch.randint(0, 2, (n,), generator=generator) for n in lengths]
    keys = [fork(fork(torch.tensor([99]), i), torch.arange(n)) if with_keys else None for i, n in enumerate(lengths)]
    return list(zip(ids, types, keys, strict=True))


def pack(parts):
    ids, types, keys = zip(*parts, strict=True) if parts else ((), (), ())
    empty = torch.zeros(0, dtype=torch.int64)
    return Packed(
        ids_t=torch.cat([empty, *ids]),
        cu_seqlens=torch.tensor([0, *map(len, ids)]).cumsum(0).int(),
        max_seqlen=max(map(len, ids), default=0),
        dropout_keys_t=torch.cat([empty, *keys]) if keys and keys[0] is not None else None,
        token_types_t=torch.cat([empty, *types]),
    )


def every_third(packed):
    """Some masked positions and their labels, the same tokens however the sequences are batched."""
    starts = packed.cu_seqlens.tolist()
    index = [torch.arange(start, end, 3) for start, end in pairwise(starts)]
    index_m = torch.cat([torch.zeros(0, dtype=torch.int64), *index])
    return index_m, (packed.ids_t[index_m] + 3) % SMALL.vocab_size


def test_a_batch_gives_what_each_sequence_gives_alone():
    model = build()
    parts = sequences()
    together = model.bert(pack(parts))
    alone = torch.cat([model.bert(pack([part])) for part in parts])
    assert (together - alone).abs().max() <= 1e-12


def test_the_order_and_company_of_sequences_do_not_matter():
    model, parts = build(), sequences()
    forwards = model.bert(pack(parts)).split(LENGTHS)
    backwards = model.bert(pack(parts[::-1])).split(LENGTHS[::-1])[::-1]
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(forwards, backwards, strict=True))


def test_token_types_and_positions_reach_the_output():
    model = build()
    ids, types, keys = sequences([9])[0]
    plain = model.bert(pack([(ids, types, keys)]))
    assert (plain - model.bert(pack([(ids, 1 - types, keys)]))).abs().max() > 0.1
    swapped = ids.clone()
    swapped[[0, 8]] = ids[[8, 0]]
    assert (plain[1:8] - model.bert(pack([(swapped, types, keys)]))[1:8]).abs().max() > 0.01  # by ALiBi alone
    untyped = Packed(ids, torch.tensor([0, 9], dtype=torch.int32), 9)
    assert torch.equal(model.bert(untyped), model.bert(pack([(ids, torch.zeros_like(ids), keys)])))


def gradients(model, batches):
    """Summed loss and gradients over micro batches."""
    model.zero_grad(set_to_none=True)
    total, correct = 0.0, 0
    for batch in batches:
        loss, right = model(batch, *every_third(batch))
        loss.backward()
        total, correct = total + loss.item(), correct + int(right)
    return total, correct, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_micro_batches_drop_the_same_elements(attention_dropout):
    """Dropout on: loss and gradients of a batch don't depend on how it is cut, nor on empty micro batches."""
    model = build(SMALL.model_copy(update={"attention_probs_dropout_prob": attention_dropout}))
    parts = sequences(with_keys=True)
    whole, correct, expected = gradients(model, [pack(parts)])
    cuts = [[parts[:1], parts[1:]], [parts[2:], [], parts[:2]], [[part] for part in parts]]
    for cut in cuts:
        total, right, found = gradients(model, [pack(micro) for micro in cut])
        assert total == pytest.approx(whole, rel=1e-13) and right == correct
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max().clamp(min=1), name


def test_dropout_is_on_with_keys_and_off_without():
    model = build()
    keyed, plain = pack(sequences(with_keys=True)), pack(sequences())
    assert torch.equal(model.bert(keyed), model.bert(keyed))
    assert (model.bert(keyed) - model.bert(plain)).abs().max() > 0.1


def test_every_site_of_a_layer_draws_its_own_mask():
    model = build(SMALL.model_copy(update={"attention_probs_dropout_prob": 0.1}))
    sites = [layer.attention.self.site for layer in model.bert.encoder.layer]
    sites += [layer.attention.output.LayerNorm.site for layer in model.bert.encoder.layer]
    sites += [layer.mlp.site for layer in model.bert.encoder.layer]
    assert len(set(sites)) == 6 and min(sites) > 1  # 0 and 1 are the embeddings' and the classifier's


def test_an_empty_micro_batch_reaches_every_parameter():
    model = build()
    loss, correct = model(pack([]), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and int(correct) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_nothing_masked_reaches_every_parameter():
    model, none = build(), torch.zeros(0, dtype=torch.int64)
    loss, _ = model(pack(sequences()), none, none)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bf16_is_near_fp32():
    packed = pack(sequences())
    exact, rounded = build(dtype=torch.float32), build(dtype=torch.bfloat16)
    index_m, _ = every_third(packed)
    logits, close = exact.logits(packed, index_m), rounded.logits(packed, index_m)
    assert close.dtype == torch.bfloat16
    assert (logits - close.float()).abs().mean() / logits.abs().mean() < 0.05


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (MaskedLanguageModel(SMALL) for _ in range(3))
    torch.manual_seed(123)
    initialize(first, 0, 0.02)
    initialize(again, 0, 0.02)
    initialize(other, 1, 0.02)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim == 1:
            assert torch.equal(a, torch.full_like(a, float(name.lower().endswith("norm.weight")))), name
        else:
            assert not torch.equal(a, c) and abs(a.std() - 0.02) < 0.006, name
    assert first.cls.predictions.decoder.weight is first.bert.embeddings.word_embeddings.weight
