"""Triton is chosen only for what it can compute; the reasons are those that a user needs."""

import pytest
import torch

from kernels import choice
from kernels.choice import OPERATIONS, Sizes

CPU = torch.device("cpu")
TRITON = dict.fromkeys(OPERATIONS, "triton")
SIZES = Sizes(hidden=64, heads=2, intermediate=40, vocabulary=37, longest=128)


@pytest.fixture(autouse=True)
def _choice_of_its_own(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", {})


def test_all_that_is_asked_for_is_tried_and_chosen():
    found = choice.obstacles(TRITON, CPU, torch.bfloat16, SIZES)
    assert found == {}
    assert choice.use(TRITON, found, CPU) == TRITON == choice.implementations()


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
