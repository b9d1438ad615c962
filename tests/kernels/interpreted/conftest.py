"""Triton kernels on CPU tensors, by Triton's interpreter: `make test-kernels` sets TRITON_INTERPRET=1 from the start."""

from __future__ import annotations

from kernels import choice, interpreter

collect_ignore_glob = ["test_*.py"]  # elsewhere: they import Triton, in the kind that this process doesn't have
if interpreter.active():
    choice.check_triton()
    collect_ignore_glob = []
