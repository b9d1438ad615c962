"""The GEGLU kernels as the assembler made them: no spills, wide loads, few instructions."""

import pytest
import torch

from kernels import aot
from kernels.fused.geglu import geglu
from kernels.fused.launch import TILES

# Instructions an output in the loop, without and with dropout, in bf16. Memory leaves an H100 time for 57 and 96.
CEILINGS = {"geglu_forward": (20, 30), "geglu_backward": (30, 40)}
KEYS = torch.zeros(64, dtype=torch.int64)


def compiled(arch, dtype, dropout_p, features=3072):
    """What became of each kernel, by name; shared memory is within what the table declares."""
    x = torch.zeros(64, 2 * features, dtype=dtype, requires_grad=True)
    with aot.fake_gpu(arch) as launches:
        geglu(x, dropout_p=dropout_p, dropout_keys_t=KEYS, site=9).backward(torch.zeros(64, features, dtype=dtype))
    kernels = {launch.name: aot.assembly(launch) for launch in launches}
    assert kernels.keys() == CEILINGS.keys()
    for name, kernel in kernels.items():
        assert kernel.spills == 0, (name, kernel)
        assert kernel.shared <= max(row["shared"] for row in TILES[name]), (name, kernel)
    return kernels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_memory_is_the_limit_at_the_tuned_size(arch, dropout_p):
    for name, kernel in compiled(arch, torch.bfloat16, dropout_p).items():
        (loop,) = kernel.loops
        loads = {op: n for op, n in loop.items() if op.startswith("LDG")}
        stores = {op: n for op, n in loop.items() if op.startswith("STG")}
        assert all("128" in op for op in [*loads, *stores]), (name, loads, stores)
        outputs = 8 * sum(loads.values()) / (2 if name == "geglu_forward" else 3)  # a thread
        assert sum(loop.values()) / outputs <= CEILINGS[name][dropout_p > 0], (name, loop)
        assert kernel.programs * kernel.warps * 32 * 16 * sum(loads.values()) >= 64 * 1024, (
            name,
            kernel,
        )  # bytes on their way


def test_other_dtypes_and_sizes_do_not_spill():
    compiled("sm_80", torch.float32, 0.1, features=1000)


def test_amd_compiles_too():
    compiled("gfx942", torch.bfloat16, 0.1)
