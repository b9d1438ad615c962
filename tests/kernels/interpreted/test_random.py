"""The generator's device functions: the bits of `kernels.random`."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.fused.random import fork, keep, keep_runs
from kernels.random import drop_threshold, keep_mask
from kernels.random import fork as expected_fork

KEYS = torch.cat([torch.tensor([0, -1, 2**63 - 1, -(2**63)]), expected_fork(5, torch.arange(28))])


@triton.jit
def fork_kernel(keys, n, words, by_number, NUMBER: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(words + i, fork(tl.load(keys + i), tl.load(n + i)).to(tl.int64, bitcast=True))
    tl.store(by_number + i, fork(tl.load(keys + i), NUMBER).to(tl.int64, bitcast=True))


@pytest.mark.parametrize("number", [0, 12, 2**40 + 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_fork_has_the_bits_of_the_definition(dtype, number):
    n = (torch.arange(32) * 8_371).to(dtype)
    words, by_number = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
    fork_kernel[(1,)](KEYS, n, words, by_number, NUMBER=number, SIZE=32)
    assert torch.equal(words, expected_fork(KEYS, n.long()))
    assert torch.equal(by_number, expected_fork(KEYS, number))


@triton.jit
def keep_kernel(keys, site, threshold, by_element, by_run, RUNS: tl.constexpr):
    seed = fork(tl.load(keys + tl.program_id(0)), site)
    element = tl.arange(0, RUNS * 8)
    tl.store(by_element + tl.program_id(0) * RUNS * 8 + element, keep(seed, element, threshold))
    runs = tl.arange(0, RUNS)[:, None]
    places = tl.program_id(0) * RUNS * 8 + runs * 8 + tl.arange(0, 8)[None, :]
    tl.store(by_run + places, keep_runs(seed, runs, threshold))


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.99999])
def test_masks_are_those_of_the_definition(p):
    masks = torch.zeros(2, 8, 256, dtype=torch.bool)
    keep_kernel[(8,)](KEYS, 9, drop_threshold(p), *masks, RUNS=32)
    expected = keep_mask(KEYS[:8], 9, 256, p)
    assert torch.equal(masks[0], expected) and torch.equal(masks[1], expected)
