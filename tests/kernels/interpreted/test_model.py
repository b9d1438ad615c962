"""The whole model on Triton's kernels: gradients as in plain PyTorch, and a run that changes from one to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels import choice
from kernels.choice import OPERATIONS
from kernels.random import fork
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize
from tests.commands import losses, metrics, pretrain

CONFIG = ModelConfig(
    vocab_size=37,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    attention_probs_dropout_prob=0.1,
)
TRITON = dict.fromkeys(OPERATIONS, "triton")


def gradients(lengths: list[int], longest: int) -> dict[str, torch.Tensor]:
    model = MaskedLanguageModel(CONFIG)
    initialize(model, 0, 0.2)  # far from 0, so that every path through the model matters
    tokens = sum(lengths)
    positions = torch.arange(tokens)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = Packed(positions * 7 % 37, cu_seqlens, longest, dropout_keys_t=fork(3, positions))
    loss, right = model(batch, positions[::5], positions[::5] * 3 % 37)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return {"loss": loss.detach(), "right": right.double(), **found}


@pytest.mark.parametrize("lengths", [[40, 1, 17], [130, 5], []])
def test_loss_and_gradients_are_those_of_plain_pytorch(lengths):
    """With dropout everywhere. An empty micro batch still reaches every parameter."""
    expected = gradients(lengths, max(lengths, default=0))
    with choice.using(**TRITON):
        ours = gradients(lengths, max(lengths, default=0))
    for name, value in expected.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_run_goes_on_with_other_kernels(tiny_config: list[str], tmp_path: Path) -> None:
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    small = ["model.hidden_size=64", "model.num_attention_heads=2", "model.num_hidden_layers=1", "train.global_batch_size=2"]
    config = [*tiny_config, *small, "train.max_steps=2", "validation.every=0"]
    pretrain("train", *config, f"run_dir={plain}")
    pretrain("train", *config, f"run_dir={changed}", "train.stop_at_step=1")
    done = pretrain("train", *config, f"run_dir={changed}", *(f"kernels.{operation}=triton" for operation in OPERATIONS))
    assert "kernels: attention triton, layer_norm triton" in done.stderr
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-5)
    norms = [[record["grad_norm"] for record in metrics(run)] for run in (changed, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0][1] != norms[1][1]  # sums in another order: it was not PyTorch again
