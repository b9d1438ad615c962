"""`python -m kernels check` as a user runs it: what fits, and what doesn't."""

import pytest

from kernels import choice
from kernels.__main__ import build_parser
from kernels.check import run

ARGUMENTS = build_parser().parse_args(["check", "--operation", "dropout", "--dtype", "bf16", "fp32"])


def test_every_case_has_a_line_and_its_errors(capsys):
    result = run(ARGUMENTS)
    assert [case["dtype"] for case in result["cases"]] == ["bf16", "fp32"]
    assert all(case["fits"] and set(case["errors"]) == {"output 0", "gradient of x"} for case in result["cases"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2


def test_a_kernel_that_is_wrong_fails_the_command(monkeypatch, capsys):
    def wrong(x_td, p, keys_t, site):
        return choice.load("dropout", "torch")(x_td, p, keys_t, site + 1)

    load = choice.load
    monkeypatch.setattr(choice, "load", lambda operation, name: wrong if name == "triton" else load(operation, name))
    with pytest.raises(RuntimeError, match="2 of 2 cases do not fit"):
        run(ARGUMENTS)
    assert capsys.readouterr().out.count("WRONG") == 2
