"""Triton kernels on CPU tensors, by Triton's interpreter: `make test-kernels` sets TRITON_INTERPRET=1 from the start."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kernels import choice, interpreter

collect_ignore_glob = ["test_*.py"]  # elsewhere: they import Triton, in the kind that this process doesn't have
if interpreter.active():
    choice.check_triton()
    collect_ignore_glob = []


@pytest.fixture
def programs_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """After `programs_from(n)` each launch's first program has number n: the end of a grid that is too large to run."""
    from triton.runtime.interpreter import interpreter_builder

    real = type(interpreter_builder).create_get_program_id

    def start(first: int) -> None:
        def program_id(axis: int) -> object:
            number = real(interpreter_builder, axis)
            number.data = number.data + (first if axis == 0 else 0)
            return number

        monkeypatch.setattr(interpreter_builder, "create_get_program_id", program_id)

    return start
