"""fp32 products by oneDNN: the same model to rounding, tried first, refused where they can't be."""

import pytest
import torch

from data_prep.cli import InputError
from pretrain import onednn
from pretrain.config import load_config
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize, set_onednn

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
CONFIG = ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def gradients(model: MaskedLanguageModel, lengths: list[int]) -> torch.Tensor:
    tokens_t = torch.arange(sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    index_m = tokens_t[1::3]
    model.zero_grad()
    model(Packed(tokens_t % 45 + 5, starts, max(lengths, default=0)), index_m, index_m % 45 + 5)[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@needs_onednn
def test_the_trial_of_what_is_right_passes() -> None:
    assert onednn.obstacle(CPU) is None


@needs_onednn
@pytest.mark.parametrize("lengths", [[5, 9, 2], [7], []])
def test_gradients_are_the_same_to_rounding(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    compute = torch.ops.dnabert2.onednn_linear
    monkeypatch.setattr("pretrain.model.linear", lambda *leaves: called.append(leaves) or compute(*leaves))
    model = MaskedLanguageModel(CONFIG)
    initialize(model, 0, 0.2)
    expected = gradients(model, lengths)
    assert not called
    set_onednn(model, True)
    found = gradients(model, lengths)
    assert len(called) == 4 * CONFIG.num_hidden_layers + 2  # all there are, the head's two among them
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@needs_onednn
def test_the_compiler_takes_it_as_one_operation() -> None:
    leaves = tuple(torch.randn(shape, requires_grad=True) for shape in ((7, 16), (5, 16), 5))
    found = torch.library.opcheck(torch.ops.dnabert2.onednn_linear.default, leaves)
    assert set(found.values()) == {"SUCCESS"}


@needs_onednn
def test_wrong_products_and_another_torch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *leaves: right(*leaves) * 1.001)
    assert "its products are off by" in str(onednn.obstacle(CPU))

    def missing(*_: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no '_linear_pointwise'")

    monkeypatch.setattr(onednn, "linear", missing)
    assert "no '_linear_pointwise'" in str(onednn.obstacle(CPU))
    assert "CPUs" in str(onednn.obstacle(torch.device("cuda")))


def test_what_it_can_not_do_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.onednn is for train\.dtype=fp32"):
        load_config("tiny", ["train.onednn=true", "train.dtype=bf16"])
    with pytest.raises(InputError, match=r"train\.onednn with train\.recompute_geglu"):
        load_config("tiny", ["train.onednn=true", "train.recompute_geglu=true"])
