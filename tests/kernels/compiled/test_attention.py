"""The attention kernels as the assembler made them: no spills, tensor cores, loads ahead of their use, few instructions."""

import pytest
import torch
import triton

from kernels import aot
from kernels.fused.attention import attention
from kernels.fused.launch import TILES, tile

OLD = triton.__version__.startswith("3.6")
LONG = {"attention_forward", "attention_backward_dq", "attention_backward_dkdv"}
SHORT = {"attention_short_forward", "attention_short_backward"}

# Instructions a score and thread of each loop (the whole program where there is none) at head dim 64 in bf16, under Triton
# 3.6 and 3.9: tiles off the diagonal, then the others. An H100 has time for about 16 a score beside its matrix units.
CEILINGS = {
    ("attention_forward", "sm_80"): ((12.2, 14.9), (12.2, 14.9)),
    ("attention_forward", "sm_90"): ((9.7, 11.6), (9.9, 11.8)),
    ("attention_backward_dq", "sm_80"): ((12.1, 15.3), (12.1, 15.3)),
    ("attention_backward_dq", "sm_90"): ((9.1, 12.2), (10.0, 13.0)),
    ("attention_backward_dkdv", "sm_80"): ((15.9, 21.4), (15.9, 21.8)),
    ("attention_backward_dkdv", "sm_90"): ((10.9, 15.3), (12.1, 16.6)),
    ("attention_short_forward", "sm_80"): ((20.7,), (20.7,)),
    ("attention_short_forward", "sm_90"): ((16.5,), (16.7,)),
    ("attention_short_backward", "sm_80"): ((22.9,), (22.4,)),
    ("attention_short_backward", "sm_90"): ((24.7,), (26.3,)),
}


def row_of(kernel, arch, dim, dtype, dropout, longest):
    facts = {"arch": aot.parse_arch(arch), "head_dim": dim, "bits": 8 * dtype.itemsize, "dropout": dropout}
    facts["block"] = triton.next_power_of_2(longest)

    def fits(row):
        return all(facts[name] in (row[name] if isinstance(row[name], list) else [row[name]]) for name in row.keys() & facts)

    return next(row for row in TILES[kernel] if fits(row))


def compiled(arch, longest, dim=64, dtype=torch.bfloat16, dropout_p=0.0):
    """What became of each kernel and the row of the table that it was made from, by name."""
    qkv = torch.zeros(longest + 5, 3, 12, dim, dtype=dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, longest, longest + 5], dtype=torch.int32)
    keys = torch.zeros(longest + 5, dtype=torch.int64)
    with aot.fake_gpu(arch) as launches:
        out = attention(qkv, cu_seqlens, longest, dropout_p=dropout_p, dropout_keys_t=keys, site=9)
        out.backward(torch.zeros_like(out))
    kernels = {}
    for launch in launches:
        kernel, row = aot.assembly(launch), row_of(launch.name, arch, dim, dtype, dropout_p > 0, longest)
        kernels[launch.name] = kernel, row
        assert kernel.spills == 0 or arch == "gfx942", (launch.name, kernel)
        assert kernel.shared <= row["shared"] <= aot.SHARED_LIMITS[aot.parse_arch(arch)], (launch.name, kernel.shared)
        if arch.startswith("sm_"):
            assert any("MMA" in op for op in kernel.operations), (launch.name, kernel.operations)
            loops = [loop for loop in kernel.loops if any("MMA" in op for op in loop)]
            if row.get("num_stages", 1) > 1:
                assert loops and all(any("LDGSTS" in op for op in loop) for loop in loops), (launch.name, loops)
    return kernels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("longest", "names"), [(128, SHORT), (300, LONG)])
def test_few_instructions_a_score_at_the_tuned_size(arch, longest, names):
    kernels = compiled(arch, longest)
    assert kernels.keys() == names
    for name, (kernel, row) in kernels.items():
        loops = [loop for loop in kernel.loops if any("MMA" in op for op in loop)] or [kernel.operations]
        if arch == "sm_90":
            assert all(any("HGMMA" in op for op in loop) for loop in loops), (name, loops)
        scores = row.get("BLOCK_M", longest) * row.get("BLOCK_N", longest) / (32 * kernel.warps)
        counts = [sum(loop.values()) / scores for loop in loops]
        ceilings = CEILINGS[name, arch][not OLD]
        assert all(count <= ceiling for count, ceiling in zip(counts, ceilings, strict=True)), (name, counts)
        # 16-byte loads from memory: what is narrower is a value a row.
        assert any("128" in op for op in kernel.operations if op.startswith("LDG")), (name, kernel.operations)
        # Eight warps at least, so that one computes while another waits.
        assert kernel.programs * kernel.warps >= 8, (name, kernel)


OTHER_ROWS = [
    (10, {}),
    (10, {"dim": 128}),
    (30, {"dim": 32}),
    (30, {"dim": 128}),
    (60, {}),
    (60, {"dim": 128}),
    (128, {"dim": 32}),
    (128, {"dim": 128}),
    (300, {"dim": 32, "dtype": torch.float16}),
    (300, {"dim": 128}),
    (300, {"dropout_p": 0.1}),
    (300, {"dropout_p": 0.1, "dim": 32}),
    (300, {"dropout_p": 0.1, "dim": 128}),
    (300, {"dtype": torch.float32}),
    (300, {"dtype": torch.float32, "dropout_p": 0.1}),
]


@pytest.mark.parametrize("number", range(len(OTHER_ROWS)), ids=lambda number: str(OTHER_ROWS[number]))
def test_other_rows_do_not_spill(number):
    """Each on one architecture under the old Triton, on the other under the new one."""
    longest, options = OTHER_ROWS[number]
    compiled(("sm_80", "sm_90")[(number + OLD) % 2], longest, **options)


def test_amd_compiles_too():
    assert compiled("gfx942", 300).keys() == LONG


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_a_gpu_of_64_kib_has_a_tile_for_every_problem(dim, dtype):
    with aot.fake_gpu("sm_75"):
        for kernel in LONG:
            for dropout in (False, True):
                assert tile(kernel, head_dim=dim, bits=8 * dtype.itemsize, dropout=dropout)


def test_a_head_of_another_size_is_refused():
    with aot.fake_gpu("sm_90"), pytest.raises(ValueError, match="heads of 96 dimensions"):
        attention(torch.zeros(3, 3, 2, 96, dtype=torch.bfloat16), torch.tensor([0, 3], dtype=torch.int32), 3)
