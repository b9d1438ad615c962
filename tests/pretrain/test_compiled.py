"""Layers under torch.compile: what they compute, and that all of them share their graphs."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from kernels.random import PURPOSE_DROPOUT, fork, keep_mask, root_key
from pretrain.compiled import compare_compiled, compile_layers
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize, set_onednn

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")

# 96 features have 24 words of dropout a token, which is no multiple of a vector: a remainder loop.
CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, hidden_dropout_prob=0.2
)


def packed(lengths: list[int]) -> Packed:
    tokens = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    keys = fork(root_key(3, PURPOSE_DROPOUT), torch.arange(tokens))
    return Packed(torch.arange(tokens) % 45 + 5, starts, max(lengths), keys)


def gradients(model: MaskedLanguageModel, batch: Packed) -> list[torch.Tensor]:
    index_m = torch.arange(len(batch.ids_t))[1::3]
    model(batch, index_m, batch.ids_t[index_m])[0].backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_four_layers_are_two_graphs_without_a_break_for_batches_of_any_lengths() -> None:
    model = MaskedLanguageModel(CONFIG)
    initialize(model, 0, 0.2)
    batches = [packed(lengths) for lengths in ([5, 9, 2], [4, 12], [3, 3, 7, 6, 1])]
    plain = [gradients(model, batch) for batch in batches]
    compile_layers(model.bert)
    for batch, expected in zip(batches, plain, strict=True):
        for a, b in zip(gradients(model, batch), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    # The last layer computes its predicted tokens only: a graph of its own. What differs between the others is no constant.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_batches_without_tokens_of_one_token_and_of_validation() -> None:
    model = MaskedLanguageModel(CONFIG)
    initialize(model, 0, 0.2)
    no_token = torch.zeros(0, dtype=torch.int64)
    nothing = Packed(no_token, torch.zeros(1, dtype=torch.int32), 0, no_token)
    batches = [packed([4, 7]), nothing, packed([6]), packed([2, 2, 1]), packed([5, 5])]
    plain = [gradients(model, batch) for batch in batches]
    validation = Packed(batches[0].ids_t, batches[0].cu_seqlens, 7)
    with torch.no_grad():
        logits = model.logits(validation, torch.arange(3))
    compile_layers(model.bert)
    for batch, expected in zip(batches, plain, strict=True):
        for a, b in zip(gradients(model, batch), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(validation, torch.arange(3)), logits, rtol=1e-4, atol=1e-5)


def test_the_last_words_of_a_row_are_drawn_as_without_a_compiler() -> None:
    keys_t = fork(root_key(1, PURPOSE_DROPOUT), torch.arange(9))
    compiled = torch.compile(lambda x_tf: x_tf @ torch.eye(96) * keep_mask(keys_t, 7, 96, 0.3), fullgraph=True)
    assert torch.equal(compiled(torch.ones(9, 96)) != 0, keep_mask(keys_t, 7, 96, 0.3))


def test_bf16_takes_sequences_longer_than_the_first_ones() -> None:
    model = MaskedLanguageModel(CONFIG)
    initialize(model, 0, 0.2)
    model.bfloat16()
    batches = [packed(lengths) for lengths in ([5, 3, 7], [12, 12], [20, 3])]
    plain = [torch.cat([x.flatten() for x in gradients(model, batch)]).float() for batch in batches]
    compile_layers(model.bert)
    for batch, expected in zip(batches, plain, strict=True):
        found = torch.cat([x.flatten() for x in gradients(model, batch)]).float()
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_the_trial_finds_rounding_only_with_a_geglu_that_is_computed_again_too() -> None:
    assert compare_compiled(CONFIG, torch.device("cpu"), torch.float32, recompute_geglu=True) < 1e-6


def test_the_trial_compiles_what_the_run_does_with_onednn_too() -> None:
    """Else the run would compile other graphs than were tried."""
    assert compare_compiled(CONFIG, torch.device("cpu"), torch.float32, onednn=True) < 1e-6
    tried = counters["stats"]["unique_graphs"]
    model = MaskedLanguageModel(CONFIG)
    set_onednn(model, True)
    compile_layers(model.bert)
    gradients(model, packed([5, 9, 2]))
    assert counters["stats"]["unique_graphs"] == tried


def test_the_trial_finds_masks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.plain.geglu as geglu

    right = geglu.dropout

    def wrong(x_tf, p, keys_t, site):  # type: ignore[no-untyped-def]
        return right(x_tf, p, keys_t + 1 if torch.compiler.is_compiling() else keys_t, site)

    monkeypatch.setattr(geglu, "dropout", wrong)
    assert compare_compiled(CONFIG, torch.device("cpu"), torch.float32) > 1e-2
