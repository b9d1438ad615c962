"""The counter-based generator: its bits against an independent implementation, and the masks that dropout makes of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dropout
from kernels.random import (
    PURPOSE_DROPOUT,
    PURPOSE_MASKS,
    PURPOSE_SHARDS,
    PURPOSE_WINDOWS,
    drop_threshold,
    fork,
    keep_mask,
    root_key,
    uniform,
)

MASK64 = (1 << 64) - 1


def splitmix64(seed: int, n: int) -> int:
    """Output `n` (from 0) of Vigna's splitmix64.c, in Python's integers of any size: it keeps a state and steps it."""
    state = seed & MASK64
    for _ in range(n + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def expected_keep(key: int, site: int, element: int, p: float) -> bool:
    """The definition in `keep_mask`'s docstring, one element at a time."""
    word = splitmix64(splitmix64(key, site), element // 4)
    lane = (word >> (16 * (element % 4))) & 0xFFFF
    lane = lane - 65536 if lane >= 32768 else lane
    return lane + 32768 >= round(p * 65536)


int64s = st.integers(-(1 << 63), (1 << 63) - 1)


def test_the_known_outputs_of_splitmix64():
    known = {  # seed 0: published beside the C code's ports; seed 1234567: Rosetta Code
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
    }
    for seed, words in known.items():
        assert [splitmix64(seed, n) for n in range(len(words))] == words
        assert fork(torch.tensor(seed), torch.arange(len(words))).tolist() == [signed(word) for word in words]


@given(key=int64s, n=st.integers(0, 40))
def test_fork_is_output_n_of_splitmix64(key, n):
    expected = signed(splitmix64(key, n))
    assert int(fork(torch.tensor([key]), n)[0]) == expected
    assert int(fork(torch.tensor([key]), torch.tensor([n]))[0]) == expected
    assert int(fork(key, torch.tensor([n]))[0]) == expected


@given(keys=st.lists(int64s, min_size=1, max_size=20), n=st.integers(0, 1 << 40))
def test_numpy_and_torch_give_the_same_bits(keys, n):
    array, tensor = np.array(keys, dtype=np.int64), torch.tensor(keys)
    for by in (n, np.full(len(keys), n)):
        with np.errstate(over="raise"):  # wrapping is meant, a warning to every user would not be
            drawn = fork(array, by)
        assert drawn.dtype == np.int64
        by_torch = torch.from_numpy(by) if isinstance(by, np.ndarray) else by
        assert drawn.tolist() == fork(tensor, by_torch).tolist()
    assert array.tolist() == keys and tensor.tolist() == keys  # the work in place is not done on the caller's memory


@given(seed=st.integers(-(1 << 70), 1 << 70))
def test_purposes_have_keys_of_their_own(seed):
    purposes = (PURPOSE_SHARDS, PURPOSE_WINDOWS, PURPOSE_MASKS, PURPOSE_DROPOUT)
    keys = {root_key(seed, purpose) for purpose in purposes}
    assert len(keys) == len(set(purposes)) == 4
    assert root_key(seed, PURPOSE_MASKS) == signed(splitmix64(seed, PURPOSE_MASKS))


def test_uniform_numbers():
    numbers = uniform(fork(np.array([5]), np.arange(100_000)))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 6 * math.sqrt(1 / 12 / len(numbers))
    assert uniform(np.array([-1], dtype=np.int64))[0] == 1 - 2.0**-53


@settings(deadline=None)
@given(key=int64s, site=st.integers(0, 60), width=st.integers(1, 11), first=st.integers(0, 3), p=st.floats(0, 0.99))
def test_a_mask_is_what_its_definition_says(key, site, width, first, p):
    mask = keep_mask(torch.tensor([key]), site, width, p, 4 * first)
    assert mask.shape == (1, width) and mask.dtype == torch.bool
    assert mask[0].tolist() == [expected_keep(key, site, 4 * first + e, p) for e in range(width)]


KEYS = fork(root_key(7, PURPOSE_DROPOUT), torch.arange(4_000))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_share_kept_is_within_six_standard_deviations(p):
    mask = keep_mask(KEYS, 3, 500, p)
    kept = 1 - drop_threshold(p) / 65536
    assert abs(kept - (1 - p)) <= 0.5 / 65536
    deviation = math.sqrt(kept * (1 - kept))
    assert abs(mask.double().mean() - kept) <= 6 * deviation / math.sqrt(mask.numel())
    assert (mask.double().mean(0) - kept).abs().max() <= 6 * deviation / math.sqrt(len(KEYS))  # every element
    assert (mask.double().mean(1) - kept).abs().max() <= 6 * deviation / math.sqrt(500)  # every token


def test_a_tokens_mask_is_the_same_wherever_it_lies():
    mask = keep_mask(KEYS, 3, 50, 0.1)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_mask(KEYS[order], 3, 50, 0.1), mask[order])
    assert torch.equal(keep_mask(KEYS[17:18], 3, 50, 0.1), mask[17:18])
    assert torch.equal(keep_mask(KEYS, 3, 7, 0.1), mask[:, :7])
    assert torch.equal(keep_mask(KEYS, 3, 30, 0.1, first=20), mask[:, 20:])
    assert keep_mask(KEYS[:0], 3, 50, 0.1).shape == (0, 50)


def test_sites_tokens_and_elements_are_uncorrelated():
    p, width = 0.1, 256
    masks = {site: keep_mask(KEYS, site, width, p).double() - (1 - p) for site in (0, 1, 8, 9, 10, 55)}
    bound = 6 * p * (1 - p) / math.sqrt(masks[0].numel() * 0.99)

    def correlation(a, b):
        return (a * b).mean().abs()

    sites = sorted(masks)
    pairs = [(a, b) for a in sites for b in sites if a < b]
    assert max(correlation(masks[a], masks[b]) for a, b in pairs) < bound
    for lag in (1, 2, 3, 4, 5, 8):  # lanes of a word, and words of neighbouring counters
        assert correlation(masks[8][:, lag:], masks[8][:, :-lag]) < bound
        assert correlation(masks[8][lag:], masks[8][:-lag]) < bound


def test_dropout_keeps_the_expectation_and_its_gradient():
    x = torch.ones(len(KEYS), 64, requires_grad=True)
    y = dropout(x, 0.1, KEYS, 5)
    y.sum().backward()
    mask = keep_mask(KEYS, 5, 64, 0.1)
    scale = 65536 / (65536 - 6554)
    assert torch.equal(y.detach(), mask * scale)
    assert torch.equal(x.grad, mask * scale)
    assert abs(y.detach().mean() - 1) < 6 * math.sqrt(0.1 / 0.9 / y.numel())


def test_no_dropout_in_evaluation():
    x = torch.randn(3, 5)
    assert dropout(x, 0.0, KEYS[:3], 0) is x
    assert dropout(x, 0.1, None, 0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_probability_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match="not in"):
        keep_mask(KEYS[:1], 0, 4, p)
