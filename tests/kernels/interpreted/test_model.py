"""The whole model on Triton's kernels: gradients as in plain PyTorch, and a run that changes from one to the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import triton

from kernels import choice
from kernels.choice import OPERATIONS
from kernels.random import fork
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize
from tests.commands import losses, metrics, pretrain

TRITON = dict.fromkeys(OPERATIONS, "triton")


def gradients(lengths: list[int], layers: int, attention_dropout: float) -> dict[str, torch.Tensor]:
    config = ModelConfig(
        vocab_size=37,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=40,
        attention_probs_dropout_prob=attention_dropout,
    )
    model = MaskedLanguageModel(config)
    initialize(model, 0, 0.2)  # far from 0, so that every path through the model matters
    tokens = sum(lengths)
    positions = torch.arange(tokens)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = Packed(positions * 7 % 37, cu_seqlens, max(lengths, default=0), dropout_keys_t=fork(3, positions))
    loss, right = model(batch, positions[::5], positions[::5] * 3 % 37)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return {"loss": loss.detach(), "right": right.double(), **found}


@pytest.mark.parametrize(("lengths", "layers", "attention_dropout"), [([20, 1, 9], 2, 0.0), ([70, 5], 1, 0.1), ([], 1, 0.1)])
def test_loss_and_gradients_are_those_of_plain_pytorch(lengths: list[int], layers: int, attention_dropout: float) -> None:
    """With dropout. An empty micro batch still reaches every parameter."""
    expected = gradients(lengths, layers, attention_dropout)
    with choice.using(**TRITON):
        ours = gradients(lengths, layers, attention_dropout)
    for name, value in expected.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="it tests runs, for which one Triton is enough")
def test_a_run_goes_on_with_other_kernels(tiny_config: list[str], tmp_path: Path) -> None:
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    small = ["model.hidden_size=64", "model.num_attention_heads=2", "model.num_hidden_layers=1", "train.global_batch_size=1"]
    config = [*tiny_config, *small, "train.max_steps=2", "validation.every=0", "checkpoint.save_every=1"]
    pretrain("train", *config, f"run_dir={plain}")
    shutil.copytree(plain, changed)
    shutil.rmtree(changed / "checkpoints" / "step-000000002")
    named = {"attention": "triton", "layer_norm": "triton", "cross_entropy": "triton"}  # the others are slow here
    done = pretrain("train", *config, f"run_dir={changed}", *(f"kernels.{key}={value}" for key, value in named.items()))
    assert "kernels: attention triton, layer_norm triton, geglu torch, cross_entropy triton" in done.stderr
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-5)
    norms = [[record["grad_norm"] for record in metrics(run)] for run in (changed, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    manifest = json.loads((changed / "checkpoints" / "step-000000002" / "MANIFEST.json").read_text())
    assert named.items() <= manifest["state"]["implementations"].items()
