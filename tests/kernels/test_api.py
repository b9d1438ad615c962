"""Bad input is refused before it reaches a kernel, and the message says what does not fit."""

import pytest
import torch

import kernels
from kernels import choice

QKV = torch.randn(6, 3, 2, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
X, ONE = torch.randn(6, 16), torch.ones(16)
KEYS = torch.arange(6)


@pytest.mark.parametrize(
    ("cu_seqlens", "longest"),
    [
        ([1, 2, 6], 4),  # doesn't begin at 0
        ([0, 2, 5], 4),  # doesn't end with the last token
        ([0, 4, 2, 6], 4),  # falls
        ([0, 2, 6], 3),  # a sequence longer than it was said to be
    ],
)
def test_cu_seqlens_that_do_not_fit(cu_seqlens, longest):
    with pytest.raises(ValueError, match="cu_seqlens does not fit: it must rise from 0 to the 6 tokens"):
        kernels.attention(QKV, torch.tensor(cu_seqlens, dtype=torch.int32), longest)


def test_cu_seqlens_are_looked_at_again_when_they_change():
    cu_seqlens = CU.clone()
    kernels.attention(QKV, cu_seqlens, 4)
    kernels.attention(QKV, cu_seqlens, 4)
    cu_seqlens[1] = 7
    with pytest.raises(ValueError, match="does not fit"):
        kernels.attention(QKV, cu_seqlens, 4)


def test_cu_seqlens_made_for_inference_are_looked_at_every_time():
    """They don't count their changes."""
    with torch.inference_mode():
        cu_seqlens = CU.clone()
        kernels.attention(QKV, cu_seqlens, 4)
        cu_seqlens[2] = 5
        with pytest.raises(ValueError, match="does not fit"):
            kernels.attention(QKV, cu_seqlens, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.attention(QKV[:, 0], CU, 4), r"\[6, 2, 8\], expected \[tokens, 3, heads, head dim\]"),
        (lambda: kernels.attention(QKV, CU.long(), 4), "int64.*expected int32"),
        (lambda: kernels.attention(QKV, CU[:0], 4), "one entry more than there are sequences"),
        (lambda: kernels.attention(QKV.long(), CU, 4), "qkv is torch.int64, expected a float dtype"),
        (lambda: kernels.attention(QKV, CU.to("meta"), 4), "on meta; expected .* on cpu"),
        (lambda: kernels.attention(QKV, CU, 4, dropout_p=0.1, dropout_keys_t=KEYS[:5]), r"dropout keys are .*\[5\]"),
        (lambda: kernels.dropout_residual_layer_norm(X, X[:5], ONE, ONE, 1e-12), r"residual \[5, 16\]"),
        (lambda: kernels.dropout_residual_layer_norm(X, None, ONE[:8], ONE, 1e-12), r"weight is \[8\]"),
        (lambda: kernels.dropout_residual_layer_norm(X, X.to("meta"), ONE, ONE, 1e-12), "residual is on meta, x on cpu"),
        (lambda: kernels.geglu(X[:, :15]), r"\[6, 15\], expected \[tokens, 2 \* features\]"),
        (lambda: kernels.geglu(X, dropout_p=0.1, dropout_keys_t=KEYS.int()), "torch.int32.*expected int64"),
        (lambda: kernels.masked_cross_entropy(X, KEYS[:5]), r"labels \[5\]"),
        (lambda: kernels.masked_cross_entropy(X, KEYS.int()), "labels are torch.int32"),
        (lambda: kernels.dropout(X[0], 0.1, KEYS, 0), r"x is \[16\]"),
        (lambda: kernels.attention(QKV, CU, 4, dropout_p=2.0), "probability 2.0 is not in"),
        (lambda: kernels.geglu(X, dropout_p=0.999999, dropout_keys_t=KEYS), "0.999999 is .*nothing would be kept"),
        (lambda: kernels.geglu(X.to(torch.float8_e4m3fn)), "x is torch.float8_e4m3fn, expected a float dtype: bf16"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_implementation_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match=r"no geglu by 'foo'.*layer_norm: triton, apex, torch"):
        choice.load("geglu", "foo")
    with pytest.raises(ValueError, match=r"no geglu by 'foo'"), choice.using(geglu="foo"):
        pass
    assert choice.implementations()["geglu"] == "torch"


def test_on_a_cpu_pytorch_is_chosen_and_said():
    before = choice.implementations()
    lines = kernels.choose(torch.device("cpu"), torch.float32, kernels.Sizes(64, 2, 64, 32, longest=128))
    assert lines == ["kernels: attention torch, layer_norm torch, geglu torch, cross_entropy torch, dropout torch"]
    assert choice.implementations() == before
