"""The LayerNorm and dropout kernels as the assembler makes them."""

import pytest
import torch
import triton

from kernels import aot
from kernels.fused import dropout, launch, layer_norm

OLD = triton.__version__.startswith("3.6")
KEYS = torch.arange(1024)


def compile_all(arch, hidden, p, dtype=torch.bfloat16, weights=None):
    """Assembly by kernel; none spills, and shared memory is within what the table declares."""
    x, weight = torch.zeros(1024, hidden, dtype=dtype), torch.zeros(hidden, dtype=weights or dtype)
    threshold = round(p * 65536)
    with aot.fake_gpu(arch) as launches:
        keys = KEYS if p else None
        y, rstd = layer_norm.layer_norm_forward(x, x, weight, weight, 1e-12, threshold, keys, 9)
        layer_norm.layer_norm_backward(y, x, x, weight, weight, rstd, threshold, keys, 9)
        if hidden == 768:
            dropout.dropout(x, 0.1, KEYS, 9)
    names = "layer_norm_forward", "layer_norm_backward", "layer_norm_sum", "dropout"
    compiled = dict(zip(names, map(aot.assembly, launches), strict=False))
    facts = {"width": next(width for width in layer_norm.WIDTHS if hidden <= width), "bits": 8 * dtype.itemsize}
    for name, assembly in compiled.items():
        rows = [row for row in launch.TILES[name] if aot.parse_arch(arch) in row.get("arch", [aot.parse_arch(arch)])]
        row = next(row for row in rows if all(row[fact] == facts[fact] for fact in row.keys() & facts))
        assert assembly.spills == 0 and assembly.shared <= row["shared"], (name, assembly)
    return compiled


def global_accesses(operations):
    """How many loads and stores of global memory there are by their width in bits."""
    widths = {}
    for operation, count in operations.items():
        kind, *suffixes = operation.split(".")
        if kind in ("LDG", "STG"):
            width = next((int(suffix) for suffix in suffixes if suffix in ("64", "128")), 32)
            widths[kind, width] = widths.get((kind, width), 0) + count
    return widths


@pytest.mark.parametrize(("arch", "p"), [("sm_80", 0.1 if OLD else 0.0), ("sm_90", 0.0 if OLD else 0.1)])
def test_hidden_768_is_fit_for_memory_speed(arch, p):
    """At 3 TB/s an H100 has time for 59 instructions an element forward, 79 backward. A thread has 24 elements of a row."""
    compiled = compile_all(arch, 768, p)
    forward, backward = compiled["layer_norm_forward"], compiled["layer_norm_backward"]
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


OTHER_ROWS = [
    (1024, {}),
    (3072, {"p": 0.0}),
    (6144, {}),
    (8192, {"weights": torch.float32}),
    (768, {"dtype": torch.float32}),
]


@pytest.mark.parametrize("number", range(len(OTHER_ROWS)), ids=lambda number: str(OTHER_ROWS[number]))
def test_other_rows_do_not_spill(number):
    """Each on one architecture under the old Triton, on the other under the new one."""
    hidden, options = OTHER_ROWS[number]
    compile_all(("sm_80", "sm_90")[(number + OLD) % 2], hidden, **{"p": 0.1, **options})


def test_it_compiles_for_amd():
    assert len(compile_all("gfx942", 768, 0.1)) == 4
