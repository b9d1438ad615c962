"""Who computes: tried, said, and never changed in silence. Without Triton and without a GPU, as most machines are."""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

import kernels
from kernels import check, choice
from kernels.choice import OPERATIONS, Sizes

CPU, SIZES = torch.device("cpu"), Sizes(hidden=64, heads=2, intermediate=64, vocabulary=32, longest=128)
EVERYTHING_AUTO = dict.fromkeys(OPERATIONS, "auto")


@pytest.fixture(autouse=True)
def _choice_of_its_own(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", dict(choice._chosen))


def test_on_a_cpu_pytorch_computes():
    found = choice.obstacles(EVERYTHING_AUTO, CPU, torch.float32, SIZES)
    assert choice.use(EVERYTHING_AUTO, found, CPU) == dict.fromkeys(OPERATIONS, "torch") == choice.implementations()


def test_what_is_asked_for_and_cannot_run_is_an_error_with_the_reason():
    requests = EVERYTHING_AUTO | {"geglu": "triton"}
    found = choice.obstacles(requests, CPU, torch.float32, SIZES)
    with pytest.raises(choice.Unavailable, match=r"kernels.geglu=triton can't run here: it needs a GPU"):
        choice.use(requests, found, CPU)
    assert set(choice.implementations().values()) == {"torch"}  # nothing was chosen by halves


def test_auto_goes_on_to_the_next_and_says_why():
    gpu = torch.device("cuda")  # only its type matters to `use`
    found = {(operation, "triton"): "the compiler failed" for operation in OPERATIONS} | {("layer_norm", "apex"): "not here"}
    names = choice.use(EVERYTHING_AUTO, found, gpu)
    assert set(names.values()) == {"torch"}
    assert "kernels: attention: not triton: the compiler failed" in choice.describe(names, found)


def test_auto_leaves_attention_in_fp32_to_pytorch_and_says_why(monkeypatch):
    monkeypatch.setattr(choice, "_obstacle", lambda *_: None)  # as on a GPU where everything works
    gpu = torch.device("cuda")
    found = choice.obstacles(EVERYTHING_AUTO, gpu, torch.float32, SIZES)
    assert list(found) == [("attention", "triton")] and "by name" in found["attention", "triton"]
    assert choice.obstacles(EVERYTHING_AUTO | {"attention": "triton"}, gpu, torch.float32, SIZES) == {}
    assert choice.obstacles(EVERYTHING_AUTO, gpu, torch.bfloat16, SIZES) == {}


def test_a_full_disk_is_no_obstacle_but_an_error(monkeypatch):
    """It says nothing about the kernel; the run that goes on without it would be slow for no reason."""

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(choice, "compiling_only", True)  # lets CPU tensors pass
    monkeypatch.setattr(choice, "load", lambda *_: full)
    with pytest.raises(RuntimeError, match="geglu by triton could not be tried: No space left on device"):
        choice.obstacles({"geglu": "triton"}, CPU, torch.bfloat16, SIZES)


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(choice.Unavailable, match="pip install"):
        choice.load("attention", "triton")


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0"])
def test_an_untested_triton_is_refused(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    with pytest.raises(choice.Unavailable, match=f"Triton {version} is not among the tested versions"):
        choice.load("attention", "triton")


def test_a_choice_inside_a_block_ends_with_it():
    def broken(x_td, p, keys_t, site):
        return x_td * 0

    x, keys = torch.ones(3, 8), torch.arange(3)
    expected = kernels.dropout(x, 0.5, keys, 0)
    with choice.using(dropout="torch"):
        choice._chosen["dropout"] = "torch", broken
        assert not kernels.dropout(x, 0.5, keys, 0).any()
    assert torch.equal(kernels.dropout(x, 0.5, keys, 0), expected)


def test_a_chosen_kernel_refuses_what_is_not_on_the_gpu():
    choice._chosen["dropout"] = "triton", lambda *_: None
    with pytest.raises(ValueError, match="dropout: computed by triton, which needs a GPU; the input is on the CPU"):
        kernels.dropout(torch.ones(3, 8), 0.5, torch.arange(3), 0)


def test_a_wrong_result_is_found():
    """What stands between a miscompiled kernel and a training run."""
    case = check.layer_norm_case(torch.float32, 64, 5)
    assert all(error.fits for error in check.measure(case, CPU))

    def slightly_off(x, residual, weight, bias, eps, **_):
        y = F.layer_norm(x + residual, x.shape[-1:], weight, bias, 1e-3)
        return y, y

    choice._chosen["layer_norm"] = "triton", slightly_off
    choice.compiling_only, before = True, choice.compiling_only  # lets CPU tensors pass
    try:
        assert not all(error.fits for error in check.measure(case, CPU))
    finally:
        choice.compiling_only = before


def test_not_a_number_does_not_fit():
    assert not check.Error("output", float("nan"), 0.0, 1.0).fits


@pytest.fixture
def apex(monkeypatch):
    """apex as it is without its CUDA kernels, by the names it has them under; which function computed is recorded."""
    used = []

    def fused_layer_norm_affine(x, weight, bias, shape, eps):
        used.append("FusedLayerNorm")
        return F.layer_norm(x, shape, weight, bias, eps)

    class FastLayerNormFN:
        @staticmethod
        def apply(x, weight, bias, eps, memory_efficient):
            used.append("FastLayerNorm")
            return F.layer_norm(x, weight.shape, weight, bias, eps)

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("apex", "apex.normalization", "apex.contrib", "apex.contrib.layer_norm"):
        module(name)
    module("apex.normalization.fused_layer_norm", fused_layer_norm_affine=fused_layer_norm_affine)
    module("apex.contrib.layer_norm.layer_norm", FastLayerNormFN=FastLayerNormFN)
    return used


@pytest.mark.parametrize(("hidden", "kernel"), [(768, "FastLayerNorm"), (192, "FusedLayerNorm")])
def test_the_adapter_of_apex_means_the_same(apex, monkeypatch, hidden, kernel):
    monkeypatch.setattr(choice, "compiling_only", True)
    with choice.using(layer_norm="apex"):
        for case in (check.layer_norm_case(torch.float32, hidden, 9, dropout_p=p, residual=bool(p)) for p in (0.0, 0.1)):
            assert all(error.fits for error in check.measure(case, CPU))
    assert set(apex) == {kernel}


def test_apex_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(choice.Unavailable, match="NVIDIA's apex can't be imported"):
        choice.load("layer_norm", "apex")
