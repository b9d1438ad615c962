"""Repairs of Triton's interpreter, which runs kernels on CPU tensors when TRITON_INTERPRET=1 is set.

Wrong in 3.6.0, 3.7.1, 3.8.0 and 3.9.0: bf16, which it keeps as 16-bit patterns, is multiplied as integers by `tl.dot`, and
casts to bf16 cut digits off instead of rounding to the nearest even. Broken in 3.6.0 with numpy 2.4: `range` over a bound
that was loaded from memory.

The variable must be set before Triton is imported for the first time: some of its functions choose their kind then.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def active() -> bool:
    """Whether kernels of this process are interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def widen(bits: Any) -> Any:
    """bf16 bit patterns (uint16) as fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """fp32 as bf16 bit patterns (uint16), rounded to the nearest even; NaN stays NaN."""
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Repair the interpreter of the Triton that is installed; a second call does nothing.

    Patched: `InterpreterBuilder.create_dot`, `.cast_impl` and `.create_fp_to_fp`, and the tensors' `__index__`.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "bf16_is_repaired"):
        return
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def wide(operand: Any) -> Any:
        return handle(widen(operand.data), tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16:
            source = wide(source)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.float32:
            return source
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return handle(narrow(source.data), tl.bfloat16)
        return cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16 and nearest:
            return handle(narrow(source.data), tl.bfloat16)
        return convert(self, source, to, rounding)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    builder.bf16_is_repaired = True

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patch_lang_tensor
