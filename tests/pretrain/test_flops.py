"""The FLOPs formula is held against torch's own counter on the real model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.random import PURPOSE_DROPOUT, fork, root_key
from pretrain.flops import mfu, peak_flops, peak_of_gpu, training_flops
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize

CONFIG = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12)
MASKED = 5


def counted(lengths: list[int]) -> dict[str, int]:
    """FLOPs of a forward and backward pass by kind of matrix product. `bmm` are those of attention, written out."""
    model, tokens = MaskedLanguageModel(CONFIG), sum(lengths)
    initialize(model, 0, CONFIG.initializer_range)
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    keys = fork(root_key(0, PURPOSE_DROPOUT), torch.arange(tokens))
    packed = Packed(torch.randint(5, 50, (tokens,)), starts, max(lengths), keys)
    index_m = torch.arange(MASKED)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(packed, index_m, packed.ids_t[index_m])[0].backward()
    return {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}


def test_the_formula_is_what_the_model_does_on_sequences_of_equal_length() -> None:
    assert training_flops(CONFIG, 24, 3 * 8**2, MASKED) == sum(counted([8, 8, 8]).values())


def test_on_sequences_of_any_length_only_padding_inside_attention_is_not_counted() -> None:
    lengths = [3, 8, 5]
    found = counted(lengths)
    in_attention = found.pop("aten.bmm")
    assert training_flops(CONFIG, 16, 0, MASKED) == sum(found.values())
    squares = sum(length**2 for length in lengths)
    assert in_attention * squares == training_flops(CONFIG, 0, squares, 0) * (3 * 8**2)


def test_the_published_model_takes_about_0_658_gflop_a_token() -> None:
    tokens = 4096 * 128  # logits at the masked tokens only
    flops = training_flops(ModelConfig(), tokens, tokens * 128, round(0.15 * tokens))
    assert flops / tokens / 1e9 == pytest.approx(0.658, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),  # not TF32
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100", "bf16", None),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA GH200 144G HBM3e", "fp32", 67),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", None),  # another GPU
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", 181.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Some GPU", "bf16", None),
    ],
)
def test_the_peak_goes_by_the_whole_name_of_a_gpu(name: str, dtype: str, tflops: float | None) -> None:
    assert peak_of_gpu(name, dtype) == (None if tflops is None else tflops * 1e12)


def test_a_cpu_has_the_peak_that_the_user_states() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "fp32", 0.5) == 5e11


def test_mfu_is_a_share_of_all_devices() -> None:
    assert mfu(4e12, seconds=2.0, devices=8, peak=1e12) == 0.25
