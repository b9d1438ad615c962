"""The bench takes the Triton kernels in, where they compute what they should."""

import dataclasses

import pytest
import torch
import triton

from kernels import bench
from kernels.bench_contenders import OPERATIONS, OURS, Sizes, problems, small_problems

CPU = torch.device("cpu")
SIZES = Sizes(tokens=128, lengths=(64,), heads=1, head_dim=64)


@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="it tests the bench, for which one Triton is enough")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_ours_takes_part_and_is_timed_forward_and_backward(operation):
    for problem in small_problems(operation, SIZES, torch.bfloat16, CPU):
        assert OURS not in bench.compare(problem)
    problem = next(problems(operation, dataclasses.replace(SIZES, tokens=16, lengths=(16,)), torch.bfloat16, CPU))
    rows = list(bench.time_problem(problem, [OURS], CPU, rounds=1))
    assert {"forward", "forward+backward"} <= {row.way for row in rows if row.contender == OURS and row.milliseconds}
