"""The cross entropy kernels as the assembler made them: no spills, wide loads, few instructions."""

import pytest
import torch

from kernels import aot
from kernels.fused.cross_entropy import masked_cross_entropy
from kernels.fused.launch import TILES

# Instructions an element that the whole program may have, at 4096 in bf16. Memory leaves an H100 time for 20 forward and 40
# backward. Forward counts a loop that only rows whose label has the largest logit go through.
CEILINGS = {"cross_entropy_forward": 13, "cross_entropy_backward": 13}


def compiled(arch, dtype, vocabulary):
    """What became of each kernel, by name; shared memory is within what the table declares."""
    logits = torch.zeros(64, vocabulary, dtype=dtype, requires_grad=True)
    with aot.fake_gpu(arch) as launches:
        loss, _, _ = masked_cross_entropy(logits * 1, torch.zeros(64, dtype=torch.int64))
        loss.backward()
    kernels = {launch.name: aot.assembly(launch) for launch in launches}
    assert kernels.keys() == {"cross_entropy_forward", "cross_entropy_sum", "cross_entropy_backward"}
    for name, kernel in kernels.items():
        assert kernel.spills == 0, (name, kernel)
        assert kernel.shared <= max(row["shared"] for row in TILES[name]), (name, kernel)
    return kernels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_memory_is_the_limit_at_the_tuned_size(arch):
    kernels = compiled(arch, torch.bfloat16, 4096)
    for name, ceiling in CEILINGS.items():
        kernel = kernels[name]
        loads = {op: n for op, n in kernel.operations.items() if op.startswith("LDG")}
        assert sum(n for op, n in loads.items() if "128" in op) * 8 * 32 * kernel.warps == 4096, (name, loads)
        assert sum(kernel.operations.values()) * 32 * kernel.warps / 4096 <= ceiling, (name, kernel)
        assert kernel.programs * 4096 * 2 >= 64 * 1024, (name, kernel)  # bytes on their way to a multiprocessor
    assert any(op.startswith("STG") and "128" in op for op in kernels["cross_entropy_backward"].operations)


def test_other_dtypes_and_sizes_do_not_spill():
    compiled("sm_80", torch.float32, 5000)


def test_amd_compiles_too():
    compiled("gfx942", torch.bfloat16, 4096)
