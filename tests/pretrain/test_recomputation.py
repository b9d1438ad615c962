"""Recomputation saves memory and changes nothing else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.random import PURPOSE_DROPOUT, fork, root_key
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize, set_recomputation

CONFIG = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
LENGTHS = [6, 9, 1]
TOKENS = sum(LENGTHS)


def step(checkpointing: bool, recompute_geglu: bool) -> tuple[list[torch.Tensor], int, int]:
    """Gradients, bytes that the forward pass keeps (parameters not counted), and FLOPs of matrix products."""
    model = MaskedLanguageModel(CONFIG)
    initialize(model, 0, 0.2)
    set_recomputation(model.bert, checkpointing, recompute_geglu)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    keys = fork(root_key(3, PURPOSE_DROPOUT), torch.arange(TOKENS))
    batch = Packed(torch.arange(TOKENS) % 45 + 5, starts, max(LENGTHS), keys)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    index_m = torch.arange(2, TOKENS, 5)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model(batch, index_m, batch.ids_t[index_m])
        loss.backward()
    return [parameter.grad for parameter in model.parameters()], sum(kept.values()), counter.get_total_flops()


@pytest.mark.parametrize(("checkpointing", "recompute_geglu"), [(True, False), (False, True), (True, True)])
def test_gradients_are_the_same_to_the_last_bit_with_less_memory(checkpointing: bool, recompute_geglu: bool) -> None:
    plain, plain_bytes, plain_flops = step(False, False)
    found, found_bytes, found_flops = step(checkpointing, recompute_geglu)
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)
    assert found_bytes < plain_bytes
    if checkpointing:
        assert found_flops > 1.2 * plain_flops  # each layer's forward pass once more
    else:
        assert found_flops == plain_flops  # the products themselves are not computed again


def test_a_layer_that_is_computed_again_keeps_its_input_only() -> None:
    _, found_bytes, _ = step(True, False)
    width = CONFIG.hidden_size * 4
    layers = CONFIG.num_hidden_layers * TOKENS * width
    around = 40 * TOKENS * width  # embeddings, head and what the loss keeps
    assert found_bytes < layers + around
