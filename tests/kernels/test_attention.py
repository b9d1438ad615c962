"""Attention against its formula, evaluated in float64 one sequence, one head and one query at a time."""

import math

import pytest
import torch

from kernels import MAX_SEQUENCE, alibi_slopes, attention
from kernels.random import fork, keep_mask

LENGTHS = [5, 1, 17, 1, 2, 30]
# Largest error allowed, relative to outputs of size 1: rounding of the output, and of a few hundred fp32 operations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(lengths, heads=3, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0)


def naive(qkv, lengths, slopes, keep=None, scale=1.0):
    """[tokens, heads, dim] in float64; `keep` [tokens, heads, keys] drops softmax weights."""
    out, start = [], 0
    for length in lengths:
        q, k, v = qkv[start : start + length].double().unbind(1)
        for i in range(length):
            rows = []
            for h, slope in enumerate(slopes):
                scores = [torch.dot(q[i, h], k[j, h]) / math.sqrt(qkv.shape[-1]) - slope * abs(i - j) for j in range(length)]
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                if keep is not None:
                    weights = weights * keep[start + i, h, :length] * scale
                rows.append(weights @ v[:, h])
            out.append(torch.stack(rows))
        start += length
    return torch.stack(out)


def test_the_slopes_of_twelve_heads_in_head_order():
    expected = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 0.70711, 0.35355, 0.17678, 0.08839]
    assert alibi_slopes(12) == pytest.approx(expected, abs=5e-6)
    assert alibi_slopes(12)[8:] == [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # every second slope of sixteen heads


def test_slopes_of_powers_of_two():
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(8) == [2**-i for i in range(1, 9)]
    assert len(alibi_slopes(7)) == 7


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_ragged_sequences(heads, dtype):
    qkv, cu_seqlens, longest = make(LENGTHS, heads, dtype=dtype)
    out = attention(qkv, cu_seqlens, longest)
    assert out.dtype == dtype and out.shape == (sum(LENGTHS), heads, 8)
    error = (out.double() - naive(qkv, LENGTHS, alibi_slopes(heads))).abs() / torch.maximum(
        out.double().abs(), torch.ones(())
    )
    assert error.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("lengths", [[9, 9, 9], [1], [1, 1, 1], [40]])
def test_equal_lengths_take_no_padding_and_mean_the_same(lengths):
    qkv, cu_seqlens, longest = make(lengths)
    out = attention(qkv, cu_seqlens, longest)
    assert (out - naive(qkv, lengths, alibi_slopes(3))).abs().max() <= 1e-12


def test_a_sequence_of_one_token_returns_its_value():
    qkv, cu_seqlens, longest = make(LENGTHS)
    assert torch.equal(attention(qkv, cu_seqlens, longest)[5], qkv[5, 2])


def test_the_gradient_is_the_formulas():
    qkv, cu_seqlens, longest = make(LENGTHS)
    ours, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    weight = torch.randn(sum(LENGTHS), 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (attention(ours, cu_seqlens, longest) * weight).sum().backward()
    (naive(theirs, LENGTHS, alibi_slopes(3)) * weight).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-12


def test_the_gradient_by_finite_differences():
    lengths = [3, 1, 2]
    qkv, cu_seqlens, longest = make(lengths, heads=2, dim=2)
    keys = fork(11, torch.arange(sum(lengths)))
    for dropout_p in (0.0, 0.3):
        assert torch.autograd.gradcheck(
            lambda x, p=dropout_p: attention(x, cu_seqlens, longest, dropout_p=p, dropout_keys_t=keys, site=8),
            (qkv.clone().requires_grad_(),),
        )


@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6]])
def test_dropout_of_weights_by_key(lengths):
    qkv, cu_seqlens, longest = make(lengths)
    keys = fork(3, torch.arange(sum(lengths)))
    out = attention(qkv, cu_seqlens, longest, dropout_p=0.25, dropout_keys_t=keys, site=12)
    keep = keep_mask(keys, 12, 3 * MAX_SEQUENCE, 0.25).view(sum(lengths), 3, MAX_SEQUENCE)
    expected = naive(qkv, lengths, alibi_slopes(3), keep, 65536 / (65536 - 16384))
    assert (out - expected).abs().max() <= 1e-12


def test_dropout_does_not_depend_on_the_batch():
    """A sequence alone, and the same sequence after a longer one, drop the same weights."""
    qkv, cu_seqlens, longest = make([30, 7])
    keys = fork(3, torch.arange(37))
    options = {"dropout_p": 0.25, "site": 12}
    together = attention(qkv, cu_seqlens, longest, dropout_keys_t=keys, **options)
    alone = attention(qkv[30:], torch.tensor([0, 7], dtype=torch.int32), 7, dropout_keys_t=keys[30:], **options)
    assert (together[30:] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0]])
def test_an_empty_batch_has_a_gradient(cu_seqlens):
    qkv = torch.zeros(0, 3, 2, 4, requires_grad=True)
    out = attention(qkv, torch.tensor(cu_seqlens, dtype=torch.int32), 0)
    assert out.shape == (0, 2, 4)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_a_sequence_over_the_limit_is_refused():
    qkv = torch.zeros(MAX_SEQUENCE + 1, 3, 1, 1)
    with pytest.raises(ValueError, match="10240"):
        attention(qkv, torch.tensor([0, MAX_SEQUENCE + 1], dtype=torch.int32), MAX_SEQUENCE + 1)


def test_heads_may_lie_apart_in_memory() -> None:
    """As a view of [tokens, heads, 3, dim]; sequences of equal lengths take another way than ragged ones."""
    for lengths in ([4, 4], [3, 5]):
        strided = torch.randn(8, 2, 3, 16, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        assert torch.equal(attention(strided, starts, max(lengths)), attention(strided.contiguous(), starts, max(lengths)))
