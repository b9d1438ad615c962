"""The LayerNorm and dropout kernels as the assembler makes them."""

import pytest
import torch

from kernels import aot
from kernels.fused import dropout, launch, layer_norm

KEYS = torch.arange(1024)


def compile_all(arch, hidden, p, weights=torch.bfloat16):
    """Assembly by kernel."""
    x, weight = torch.randn(1024, hidden).bfloat16(), torch.randn(hidden).to(weights)
    threshold = round(p * 65536)
    with aot.fake_gpu(arch) as launches:
        keys = KEYS if p else None
        y, rstd = layer_norm.layer_norm_forward(x, x, weight, weight, 1e-12, threshold, keys, 9)
        layer_norm.layer_norm_backward(y, x, x, weight, weight, rstd, threshold, keys, 9)
        dropout.dropout(x, 0.1, KEYS, 9)
    names = "forward", "backward", "sum", "dropout"
    return dict(zip(names, map(aot.assembly, launches), strict=True))


def global_accesses(operations):
    """How many loads and stores of global memory there are by their width in bits."""
    widths = {}
    for operation, count in operations.items():
        kind, *suffixes = operation.split(".")
        if kind in ("LDG", "STG"):
            width = next((int(suffix) for suffix in suffixes if suffix in ("64", "128")), 32)
            widths[kind, width] = widths.get((kind, width), 0) + count
    return widths


@pytest.mark.parametrize(("arch", "p"), [("sm_80", 0.1), ("sm_90", 0.1), ("sm_90", 0.0)])
def test_hidden_768_is_fit_for_memory_speed(arch, p):
    """At 3 TB/s an H100 has time for 59 instructions an element forward, 79 backward. A thread has 24 elements of a row."""
    compiled = compile_all(arch, 768, p)
    for name, assembly in compiled.items():
        assert assembly.spills == 0, name
        rows = launch.TILES["dropout" if name == "dropout" else f"layer_norm_{name}"]
        assert assembly.shared <= next(row["shared"] for row in rows if "arch" not in row), name
    forward, backward = compiled["forward"], compiled["backward"]
    assert sum(forward.operations.values()) <= 24 * (34 if p else 22)
    assert sum(backward.loops[0].values()) <= 24 * (34 if p else 20)
    assert forward.programs * forward.warps >= 32 and backward.programs >= 2
    for operations, loads, stores in ((forward.operations, 12, 3), (backward.loops[0], 9, 6 if p else 3)):
        assert not any(operation.startswith("BAR") for operation in operations)  # a warp has its row for itself
        accesses = global_accesses(operations)
        assert accesses[("LDG", 128)] == loads and accesses[("STG", 128)] == stores
        # Besides them a number or two a row: the key, the standard deviation.
        assert sum(count for (_, width), count in accesses.items() if width < 128) <= 2
    # Sixteen elements a thread: two rows, a run of eight each. A word of the generator is drawn for four elements.
    assert sum(compiled["dropout"].operations.values()) <= 16 * 22
    assert global_accesses(compiled["dropout"].operations) == {("LDG", 64): 2, ("LDG", 128): 2, ("STG", 128): 2}


def test_the_widest_rows_and_fp32_weights_do_not_spill():
    for name, assembly in compile_all("sm_90", 8192, 0.1, weights=torch.float32).items():
        assert assembly.spills == 0, name


def test_it_compiles_for_amd():
    assert len(compile_all("gfx942", 768, 0.1)) == 4
