"""`python -m kernels compile`: the table, and what can't be compiled."""

import pytest

from data_prep.cli import InputError
from kernels.__main__ import build_parser
from kernels.compile import run

KEYS = {"name", "arch", "spills", "registers", "shared"}  # scripts rely on these


def arguments(*argv):
    return build_parser().parse_args(["compile", *argv])


def test_every_launch_of_an_operation_is_listed_once_an_architecture(capsys):
    archs = ["sm_80", "sm_90", "gfx942"]
    result = run(arguments("--operation", "dropout", *(word for arch in archs for word in ("--arch", arch))))
    rows = [(row["name"], row["problem"], row["arch"]) for row in result["kernels"]]
    assert len(set(rows)) == len(rows)
    for arch in archs:
        assert {row["name"] for row in result["kernels"] if row["arch"] == arch} == {"dropout_kernel"}
    for row in result["kernels"]:
        assert row.keys() >= KEYS and row["fits"] and row["spills"] == 0 and row["shared_limit"] > 0 and row["registers"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_an_unknown_architecture_is_bad_input():
    with pytest.raises(InputError, match="unknown architecture sm_1"):
        run(arguments("--arch", "sm_1"))


def test_the_interpreter_is_no_compiler(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="unset it"):
        run(arguments("--arch", "sm_90"))
