"""The repairs of Triton's interpreter: without them bf16 kernels would seem to be wrong, or right when they are not."""

import torch
import triton
import triton.language as tl

from kernels.fused.launch import launch

CPU = torch.device("cpu")


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + i, tl.dot(tl.load(a + i), tl.load(b + i)).to(out.dtype.element_ty))


@triton.jit
def _rounded(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def _count_to(bound, out):
    total = 0
    for i in range(tl.load(bound)):
        total += i
    tl.store(out, total)


def test_dot_multiplies_bf16():
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(16, 16)
    launch(_product, (1,), a, b, out, device=CPU, N=16)
    assert torch.allclose(out, a.float() @ b.float(), atol=1e-5)


def test_bf16_is_rounded_to_the_nearest_even():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf, -0.0])  # two ties, an overflow
    out = torch.empty(1024, dtype=torch.bfloat16)
    launch(_rounded, (1,), x, out, device=CPU, N=1024)
    assert torch.equal(out, x.bfloat16())


def test_nan_stays_nan():
    x = torch.full((16,), torch.nan)
    out = torch.zeros(16, dtype=torch.bfloat16)
    launch(_rounded, (1,), x, out, device=CPU, N=16)
    assert out.isnan().all()


def test_a_bound_from_memory():
    out = torch.zeros(1, dtype=torch.int64)
    launch(_count_to, (1,), torch.tensor([5]), out, device=CPU)
    assert out.item() == 10
