"""Compiling for GPUs that aren't there: the counts that the other tests here rely on."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import aot
from kernels.fused.launch import device_limits, launch

X = torch.zeros(4096, dtype=torch.bfloat16)


@triton.jit
def _add(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(tl.float32) + 1.0, mask=i < n)


@triton.jit
def _power(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.load(x + i).to(tl.float32)
    for _ in range(n):
        total += tl.exp2(total)
    tl.store(out + i, total)


def compiled(kernel, arch, *args, **options):
    with aot.fake_gpu(arch) as launches:
        launch(kernel, (4,), *args, device=X.device, **options)
    assert len(launches) == 1 and launches[0].grid == (4,)
    return aot.assembly(launches[0])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_what_is_aligned_is_loaded_16_bytes_at_once(arch):
    wide = compiled(_add, arch, X, X, 4096, BLOCK=1024)
    narrow = compiled(_add, arch, X[1:], X[1:], 4095, BLOCK=1024)
    assert any(op.startswith("LDG") and "128" in op for op in wide.operations)
    assert not any(op.startswith("LDG") and "128" in op for op in narrow.operations)
    assert wide.spills == narrow.spills == 0 and wide.registers > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_loops_are_found(arch):
    assert not compiled(_add, arch, X, X, 4096, BLOCK=1024).loops
    loops = compiled(_power, arch, X, X, 77, BLOCK=256).loops
    assert loops and any(op.startswith("MUFU.EX2") for op in loops[0])


def test_spills_are_counted():
    options = {"BLOCK": 2048, "num_warps": 1}  # 64 sums a thread
    assert compiled(_power, "sm_90", X, X, 77, **options).spills == 0
    assert compiled(_power, "sm_90", X, X, 77, maxnreg=32, **options).spills > 0


def test_amd_compiles_too():
    assembly = compiled(_add, "gfx942", X, X, 4096, BLOCK=1024)
    assert assembly.registers > 0 and assembly.spills == 0 and any("_load_" in op for op in assembly.operations)


def test_limits_are_those_of_the_architecture():
    with aot.fake_gpu("sm_86"):
        assert device_limits() == (86, 101376)
    with aot.fake_gpu("gfx942"):
        assert device_limits() == ("gfx942", 65536)


def test_an_unknown_architecture_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"sm_12345.*sm_90"), aot.fake_gpu("sm_12345"):
        pass
