"""`python -m kernels compile`: what the assembler makes of every kernel, for GPUs that need not be there.

The real functions are called on CPU tensors, forward and backward, so each launch is compiled with its real block sizes and
alignments (`kernels.aot`). Registers, spills, shared memory and instructions are facts; times are not to be had this way.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data_prep.cli import InputError
from kernels import check, choice, interpreter
from kernels.check import DROPOUT_P, DTYPES, Case

TENSOR_CORES = ("HGMMA", "HMMA", "v_mfma")  # wgmma of sm_90, mma.sync, AMD's matrix instructions
COLUMNS = f"{'kernel':27} {'problem':58} {'arch':7} {'regs':>4} {'spills':>6} {'shared':>7} {'warps':>5} {'per SM':>6} "
COLUMNS += f"{'mma':>4} {'async':>5} {'all':>6}  innermost loops"


def cases(dtypes: Sequence[torch.dtype], operation: str | None = None) -> Iterator[Case]:
    """Problems that between them launch every kernel: the published sizes, other heads, short and long sequences."""
    for dtype in dtypes:
        every = [
            check.attention_case(dtype, 12, dim, lengths, p)
            for dim in (32, 64, 128)
            for p in (0.0, DROPOUT_P)
            for lengths in ([128] * 4, [37, 64], [600, 1, 37])
        ]
        for p in (0.0, DROPOUT_P):
            every.append(check.layer_norm_case(dtype, 768, 4099, dropout_p=p))
            every.append(check.geglu_case(dtype, 3072, 4099, dropout_p=p))
        every.append(check.layer_norm_case(dtype, 192, 4099, dropout_p=DROPOUT_P))
        every.append(check.layer_norm_case(dtype, 2560, 4099, residual=False))
        every += [check.cross_entropy_case(dtype, vocabulary, 640) for vocabulary in (4096, 65536)]
        every.append(check.dropout_case(dtype, 768, 4099))
        yield from (case for case in every if operation in (None, case.operation))


def compiled(arch: str, every: Iterator[Case]) -> Iterator[dict[str, Any]]:
    """Facts of each kernel that the cases launch, once a kernel.

    Keys: name, problem, dtype, arch, registers (a thread's), spills (instructions), shared (bytes), shared_limit, warps,
    programs (that fit a multiprocessor; 0 unknown), tensor_cores, async_copies, instructions, loops (instructions of
    each innermost loop). Unavailable without Triton.
    """
    choice.load("attention", "triton")  # says what is missing
    from kernels import aot

    seen = set()
    with aot.fake_gpu(arch) as launches, _compiling_only():
        for case in every:
            with choice.using(**{case.operation: "triton"}):
                check.results(case, case.inputs(), torch.device("cpu"))
            for launch in launches:
                if launch.kernel.hash in seen:
                    continue
                seen.add(launch.kernel.hash)
                facts = aot.assembly(launch)
                yield {
                    "name": launch.name,
                    "problem": case.name,
                    "dtype": next(name for name, value in DTYPES.items() if value == case.dtype),
                    "arch": arch,
                    "registers": facts.registers,
                    "spills": facts.spills,
                    "shared": facts.shared,
                    "shared_limit": aot.SHARED_LIMITS[aot.parse_arch(arch)],
                    "warps": facts.warps,
                    "programs": facts.programs,
                    "tensor_cores": count(facts.operations, *TENSOR_CORES),
                    "async_copies": count(facts.operations, "LDGSTS", "UTMALDG"),
                    "instructions": facts.operations.total(),
                    "loops": [loop.total() for loop in facts.loops],
                }
            launches.clear()


def count(operations: Counter[str], *prefixes: str) -> int:
    """How many of the instructions have a name that begins with one of these."""
    return sum(number for name, number in operations.items() if name.startswith(prefixes))


@contextlib.contextmanager
def _compiling_only() -> Iterator[None]:
    choice.compiling_only = True
    try:
        yield
    finally:
        choice.compiling_only = False


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the table. InputError without Triton or for an unknown architecture; RuntimeError where a kernel can't fit."""
    if interpreter.active():
        raise InputError("TRITON_INTERPRET=1 is set, which replaces the compiler; unset it")
    kernels, bad = [], 0
    print(COLUMNS)
    try:
        for arch in args.arch:
            for row in compiled(arch, cases([DTYPES[name] for name in args.dtype], args.operation)):
                row["fits"] = row["spills"] == 0 and row["shared"] <= row["shared_limit"]
                bad += not row["fits"]
                kernels.append(row)
                print(_line(row), flush=True)
    except (choice.Unavailable, ValueError) as error:
        raise InputError(str(error)) from None
    import triton

    if bad:
        raise RuntimeError(f"{bad} of {len(kernels)} kernels spill registers or want too much shared memory")
    return {"kernels": kernels, "triton": triton.__version__}


def _line(row: dict[str, Any]) -> str:
    problem = f"{row['problem']} {row['dtype']}"
    return (
        f"{row['name']:27} {problem:58} {row['arch']:7} {row['registers']:4} {row['spills']:6} {row['shared']:7} "
        f"{row['warps']:5} {row['programs'] or '':>6} {row['tensor_cores']:4} {row['async_copies']:5} "
        f"{row['instructions']:6}  "
        f"{' '.join(map(str, row['loops']))}{'' if row['fits'] else '  BAD'}"
    )
