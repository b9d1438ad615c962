"""Triton is chosen only for what it can compute; the reasons are those that a user needs."""

import dataclasses
import importlib
from itertools import product

import pytest
import torch

from kernels import choice
from kernels.choice import OPERATIONS, Sizes
from kernels.fused.launch import launch

CPU = torch.device("cpu")
TRITON = dict.fromkeys(OPERATIONS, "triton")
SIZES = Sizes(hidden=64, heads=2, intermediate=40, vocabulary=37, longest=128)


@pytest.fixture(autouse=True)
def _choice_of_its_own(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", dict(choice._chosen))


def test_every_kernel_that_a_model_launches_is_tried_and_chosen(monkeypatch):
    launched = set()  # names, each with its block or with whether there is dropout

    def recorded(kernel, *args, **options):
        name, dropout = kernel.fn.__name__, options.get("DROPOUT", options.get("THRESHOLD", 0) > 0)
        launched.add((name, options["BLOCK"] if "short" in name else dropout))
        launch(kernel, *args, **options)

    for operation in OPERATIONS:
        monkeypatch.setattr(importlib.import_module(f"kernels.fused.{operation}"), "launch", recorded)
    sizes = dataclasses.replace(SIZES, longest=200, attention_dropout=0.1)
    found = choice.obstacles(TRITON, CPU, torch.bfloat16, sizes)
    assert found == {}
    assert choice.use(TRITON, found, CPU) == TRITON == choice.implementations()

    short = "attention_short_forward", "attention_short_backward"
    either = "attention_forward", "attention_backward_dq", "attention_backward_dkdv", "geglu_forward", "geglu_backward"
    either += "layer_norm_forward_kernel", "layer_norm_backward_kernel"
    neither = "layer_norm_sum_kernel", "cross_entropy_forward", "cross_entropy_sum", "cross_entropy_backward"
    expected = {*product(short, (16, 32, 64, 128)), *product(either, (False, True)), *product(neither, [False])}
    assert launched == {*expected, ("dropout_kernel", True)}


def test_the_interpreter_is_never_chosen_by_itself():
    auto = dict.fromkeys(OPERATIONS, "auto")
    assert choice.use(auto, choice.obstacles(auto, CPU, torch.float32, SIZES), CPU) == dict.fromkeys(OPERATIONS, "torch")


def test_sizes_that_have_no_kernel():
    sizes = Sizes(hidden=96, heads=2, intermediate=40, vocabulary=37, longest=128)  # heads of 48
    found = choice.obstacles(TRITON, CPU, torch.float32, sizes)
    assert set(found) == {("attention", "triton"), ("layer_norm", "triton")}
    assert "48" in found["attention", "triton"] and "32, 64" in found["attention", "triton"]
    assert "96" in found["layer_norm", "triton"] and "multiple of 64" in found["layer_norm", "triton"]
    with pytest.raises(choice.Unavailable, match=r"kernels\.attention=triton can't run here: "):
        choice.use(TRITON, found, CPU)
