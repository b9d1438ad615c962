from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.cli import InputError
from finetune.batches import pack
from finetune.metrics import Objective
from finetune.model import Classifier, build, encoder_sha256
from finetune.tasks import Settings
from finetune.train import predict
from pretrain.model import Encoder, MaskedLanguageModel, ModelConfig, initialize

CPU = torch.device("cpu")


@pytest.fixture
def pretrained(small_config):
    model = MaskedLanguageModel(small_config)
    initialize(model, 99, 0.02)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_names_and_size_are_those_of_a_published_classifier():
    with torch.device("meta"):
        model = Classifier(ModelConfig(), 2)
    head = 768 * 768 + 768 + 2 * 768 + 2
    # The published 117,074,176 without the masked-language-model head (its decoder's matrix is the embeddings').
    assert sum(parameter.numel() for parameter in model.parameters()) == 117_074_176 - 596_224 + head
    names = set(model.state_dict())
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"} <= names
    assert "bert.encoder.layer.11.mlp.gated_layers.weight" in names


def test_weights_are_taken_and_the_head_is_fresh_and_the_same_for_both(small_config, pretrained):
    loaded = build(small_config, 3, pretrained, 0, "there")
    fresh = build(small_config, 3, None, 0, "random")
    for name, parameter in loaded.bert.named_parameters(prefix="bert"):
        if not name.startswith("bert.pooler."):
            assert torch.equal(parameter, pretrained[name])
    assert torch.equal(loaded.classifier.weight, fresh.classifier.weight)
    assert torch.equal(loaded.bert.pooler.dense.weight, fresh.bert.pooler.dense.weight)
    assert not torch.equal(loaded.bert.embeddings.word_embeddings.weight, fresh.bert.embeddings.word_embeddings.weight)
    assert encoder_sha256(loaded) != encoder_sha256(fresh)
    assert encoder_sha256(loaded) == encoder_sha256(build(small_config, 2, pretrained, 7, "there"))
    other = build(small_config, 3, None, 1, "random")
    assert not torch.equal(other.classifier.weight, fresh.classifier.weight)


def test_weights_that_do_not_fit_are_refused_by_name(small_config, pretrained):
    name = "bert.encoder.layer.1.mlp.wo.weight"
    with pytest.raises(InputError, match=rf"there: {name} is \[32, 65\], its configuration says \[32, 64\]"):
        build(small_config, 2, {**pretrained, name: torch.zeros(32, 65)}, 0, "there")
    del pretrained[name]
    with pytest.raises(InputError, match=f"there: has no tensor {name}"):
        build(small_config, 2, pretrained, 0, "there")


def test_logits_do_not_depend_on_the_rest_of_the_batch(small_config, planted_tokens, monkeypatch):
    tokens = planted_tokens["test"]
    model = build(small_config, 2, None, 0, "random")
    whole = predict(model, tokens, Objective(2), Settings(), CPU)
    with torch.inference_mode():
        alone = [model(pack(tokens, np.array([row])))[0].numpy() for row in range(len(tokens.labels))]
    assert np.abs(whole - np.stack(alone)).max() < 1e-6
    import finetune.train

    monkeypatch.setattr(finetune.train, "micro_batches", lambda lengths: [np.arange(len(lengths))[::-1]])
    assert np.abs(whole - predict(model, tokens, Objective(2), Settings(), CPU)).max() < 1e-6


def test_dropout_does_not_depend_on_the_rest_of_the_batch(small_config, planted_tokens):
    tokens = planted_tokens["test"]
    model = build(small_config, 2, None, 0, "random")
    rows, positions = np.array([4, 9, 2]), np.array([100, 101, 102])
    together = model(pack(tokens, rows, seed=3, positions=positions))
    for number in range(3):
        alone = model(pack(tokens, rows[[number]], seed=3, positions=positions[[number]]))
        assert torch.allclose(together[number], alone[0], atol=1e-6)
    assert not torch.allclose(together, model(pack(tokens, rows, seed=4, positions=positions)), atol=1e-4)
    assert not torch.allclose(together, model(pack(tokens, rows)), atol=1e-4)


def test_the_last_layer_at_cls_alone_gives_the_states_and_gradients_of_the_whole_one(small_config, planted_tokens):
    tokens, rows = planted_tokens["test"], np.arange(20)
    batch = pack(tokens, rows, seed=3, positions=rows)
    model = build(small_config, 2, None, 0, "random").double().bert
    short = model.embed(batch)
    gradients = torch.autograd.grad(short.square().sum(), list(model.parameters()), allow_unused=True)
    whole = Encoder.forward(model, batch)[batch.cu_seqlens[:-1]]
    assert torch.equal(short, whole)
    expected = torch.autograd.grad(whole.square().sum(), list(model.parameters()), allow_unused=True)
    for one, other in zip(gradients, expected, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-12)
