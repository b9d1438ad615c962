"""Triton kernels compiled for GPUs that aren't there: `make test-kernels`, under the oldest and the newest Triton."""

from __future__ import annotations

from kernels import choice, interpreter

collect_ignore_glob = ["test_*.py"]  # elsewhere: they import Triton, in the kind that this process doesn't have
if not interpreter.active():
    try:
        choice.check_triton()
        collect_ignore_glob = []
    except choice.Unavailable:
        pass
