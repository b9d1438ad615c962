"""On a real GPU: every case of `python -m kernels check`, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import check, choice
from kernels.choice import OPERATIONS, Sizes

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU is seen", allow_module_level=True)
GPU = torch.device("cuda")
TRITON = dict.fromkeys(OPERATIONS, "triton")
CASES = list(check.cases(list(check.DTYPES.values()), small=False))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.dtype}-{case.name}")
def test_it_means_what_its_definition_says(case):
    with choice.using(**TRITON):
        assert [str(error) for error in check.measure(case, GPU) if not error.fits] == []


@pytest.mark.parametrize(
    "case",
    [
        check.attention_case(torch.bfloat16, 12, 64, [128] * 64),
        check.attention_case(torch.bfloat16, 12, 64, [1024, 37, 2048, 1]),
        check.layer_norm_case(torch.bfloat16, 768, 8192, dropout_p=0.1),
        check.cross_entropy_case(torch.bfloat16, 4096, 1024),
    ],
    ids=lambda case: case.name,
)
def test_the_same_bits_every_time(case):
    inputs = case.inputs()
    with choice.using(**TRITON):
        first, second = (check.results(case, inputs, GPU) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_published_model_is_computed_by_triton():
    auto = dict.fromkeys(OPERATIONS, "auto")
    sizes = Sizes(hidden=768, heads=12, intermediate=3072, vocabulary=4096, longest=512)
    found = choice.obstacles(auto, GPU, torch.bfloat16, sizes)
    assert found == {}, found


def test_dropout_is_the_same_on_cpu_and_gpu():
    x, keys = torch.ones(1000, 768), torch.arange(1000) * 0x9E3779B97F4A7C1
    expected = kernels.dropout(x, 0.1, keys, 12)
    with choice.using(**TRITON):
        assert torch.equal(kernels.dropout(x.to(GPU), 0.1, keys.to(GPU), 12).cpu(), expected)


def test_torch_compile_keeps_the_kernels_in_one_graph():
    def block(qkv, cu_seqlens, residual, weight, bias):
        out = kernels.attention(qkv, cu_seqlens, 100).flatten(1)
        y, again = kernels.dropout_residual_layer_norm(out, residual, weight, bias, 1e-12)
        return kernels.geglu(y) + again[:, : y.shape[1] // 2]

    generator = torch.Generator(GPU).manual_seed(0)
    qkv = torch.randn(160, 3, 2, 64, device=GPU, generator=generator, requires_grad=True)
    residual, weight, bias = (torch.randn(*shape, device=GPU, generator=generator) for shape in ((160, 128), (128,), (128,)))
    cu_seqlens = torch.tensor([0, 100, 160], dtype=torch.int32, device=GPU)
    with choice.using(**TRITON):
        expected = block(qkv, cu_seqlens, residual, weight, bias)
        (gradient,) = torch.autograd.grad(expected.sum(), qkv)
        ours = torch.compile(block, fullgraph=True)(qkv, cu_seqlens, residual, weight, bias)
        assert torch.allclose(ours, expected, atol=1e-4)
        assert torch.allclose(torch.autograd.grad(ours.sum(), qkv)[0], gradient, atol=1e-4)
