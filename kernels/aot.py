"""Compiles kernels for GPUs that this machine doesn't have, and reads what the assembler made of them.

`fake_gpu` puts a driver in place of Triton's that names another target, so that the real wrappers, called on CPU tensors,
compile each of their launches with its real block sizes, alignments and options; nothing runs. Triton brings NVIDIA's
assembler and disassembler with it. What can't be seen here: time, races, limits at launch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a block may ask for (CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability"; on AMD the local data share), and what a multiprocessor has in all.
SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
SHARED_OF_MULTIPROCESSOR = {75: 65536, 80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
REGISTERS_OF_MULTIPROCESSOR, WARPS_OF_MULTIPROCESSOR = 65536, 64

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(?P<guard>@!?U?P\d+\s+)?(?P<op>[A-Z][A-Z0-9_]+(?:\.\w+)*)(?P<rest>.*)"
)


def parse_arch(name: str) -> int | str:
    """ "sm_90" as 90; "gfx942" as it is. ValueError for one that isn't in SHARED_LIMITS."""
    arch: int | str = int(name[3:]) if re.fullmatch(r"sm_\d+", name) else name
    if arch not in SHARED_LIMITS:
        known = ", ".join(a if isinstance(a, str) else f"sm_{a}" for a in SHARED_LIMITS)
        raise ValueError(f"unknown architecture {name}; known are {known}")
    return arch


class _Driver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, arch: int | str) -> None:
        nvidia = isinstance(arch, int)
        self.arch = arch
        self.target = GPUTarget("cuda" if nvidia else "hip", arch, 32 if nvidia else 64)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device number; no real GPU has one of these.
        return 1000 + list(SHARED_LIMITS).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMITS[self.arch], "multiprocessor_count": 132}


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled instead of run."""

    name: str
    grid: tuple[int, ...]
    kernel: Any  # triton.compiler.CompiledKernel


@contextlib.contextmanager
def fake_gpu(arch: str) -> Iterator[list[Launch]]:
    """Within it every launch is compiled for `arch` ("sm_80", "gfx942") and appended to the list; no kernel runs.

    ValueError for an unknown architecture.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        launches.append(Launch(self.fn.__name__, grid, kernel))
        return kernel

    before = driver._active
    driver.set_active(_Driver(parse_arch(arch)))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before


@dataclass(frozen=True)
class Assembly:
    """What became of a kernel. Counts are of instructions as they stand in the code; registers are a thread's."""

    registers: int
    spills: int  # loads and stores of local memory
    shared: int  # bytes a program
    warps: int
    programs: int  # that fit a multiprocessor at once, by registers, warps and shared memory; 0: not known
    operations: Counter[str]  # whole kernel, SASS names with their suffixes ("LDG.E.128")
    loops: list[Counter[str]]  # the same for each innermost loop, in the order of the code


def assembly(launch: Launch) -> Assembly:
    """Read registers, spills and instructions; from the cubin on NVIDIA, from the text of the code on AMD."""
    kernel = launch.kernel
    arch, warps, shared = kernel.metadata.target.arch, kernel.metadata.num_warps, kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        return _amd(kernel.asm["amdgcn"], warps, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    registers = int(found[1])
    operations, loops = _count(code)
    spills = sum(n for op, n in operations.items() if op.split(".")[0] in ("LDL", "STL"))
    a_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps in units of 256
    programs = min(
        REGISTERS_OF_MULTIPROCESSOR // (a_warp * warps),
        WARPS_OF_MULTIPROCESSOR // warps,
        SHARED_OF_MULTIPROCESSOR[arch] // (shared + 1024),  # the system takes 1 KiB of each block
    )
    return Assembly(registers, spills, shared, warps, programs, operations, loops)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _count(code: str) -> tuple[Counter[str], list[Counter[str]]]:
    """Instructions of the whole code, and of each innermost loop, found by the branches that go back."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    back: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif not line.strip().startswith(".") and (found := _INSTRUCTION.match(line)):
            to = re.search(r"(\.L_x_\d+)", found["rest"])
            if found["op"].startswith("BRA") and to and to[1] in labels:
                # A bare branch right after a wait on a barrier leaves an out-of-line wait: no loop.
                waits = any(op.startswith("SYNCS") for op in instructions[-3:])
                start = labels[to[1]]
                if (found["guard"] or not waits) and len(instructions) - start > 8:
                    back.append((start, len(instructions)))
            instructions.append(found["op"])
    inner: list[tuple[int, int]] = []
    for start, end in sorted(back, key=lambda loop: loop[1] - loop[0]):
        if all(end < other[0] or other[1] < start for other in inner):
            inner.append((start, end))
    return Counter(instructions), [Counter(instructions[start : end + 1]) for start, end in sorted(inner)]


def _amd(code: str, warps: int, shared: int) -> Assembly:
    """From LLVM's remarks at the end of the code (AMDGPU backend, "kernel info" comments)."""

    def number(name: str) -> int:
        found = re.search(rf"{name}:?\s*(\d+)", code)
        return int(found[1]) if found else 0

    operations = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", code, re.MULTILINE))
    spills = number(r"\.vgpr_spill_count") + number(r"\.sgpr_spill_count")
    return Assembly(number(r"\.vgpr_count"), spills, shared, warps, 0, operations, [])
