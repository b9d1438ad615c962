"""Optimizers: on any number of ranks and at any stage what the formulas give for one tensor; who computes them."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.cli import InputError
from pretrain import checkpoint
from pretrain.config import OptimizerConfig
from pretrain.lamb import Lamb
from pretrain.model import MaskedLanguageModel, initialize
from pretrain.optimizer import HostJudged, build_optimizer, name_of, set_steps
from tests.commands import python
from tests.pretrain import optimizer_worker as worker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two, one and three ranks trained, and three that went on from what two had saved."""
    directories = {name: tmp_path_factory.mktemp(name) for name in ("two", "one", "three", "two-then-three")}
    jobs = [("two", 2), ("one", 1), ("three", 3), ("two-then-three", 3)]
    for name, ranks in jobs:
        source = [directories["two"]] if name == "two-then-three" else []
        done = python("-m", "tests.pretrain.optimizer_worker", directories[name], *source, ranks=ranks)
        assert done.returncode == 0, done.stderr
    return directories


def expected(name: str) -> dict[str, torch.Tensor]:
    """Weights after the last step, by the formulas: each parameter by itself, the whole batch at once."""
    config = worker.case(name)
    settings, decay_all = config.optimizer, config.optimizer.decay_norms_and_biases
    model = MaskedLanguageModel(config.model)
    initialize(model, 0, worker.STD)
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    taken = 0
    for step in range(worker.STEPS):
        if step == worker.BAD_STEP:
            continue
        taken += 1
        model.zero_grad()
        for batch in worker.batches(step, 0, 1):
            (model(batch.packed, batch.index_m, batch.labels_m)[0] / worker.MASKED).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert norm > settings.gradient_clipping  # or clipping is not tested
        rate = settings.learning_rate * (worker.STEPS - step) / worker.STEPS
        for n, p in model.named_parameters():
            decayed = decay_all or p.ndim > 1
            gradient = p.grad * settings.gradient_clipping / (norm + 1e-6)
            (first, second), (beta_1, beta_2) = moments[n], settings.betas
            first.mul_(beta_1).add_((1 - beta_1) * gradient)
            second.mul_(beta_2).add_((1 - beta_2) * gradient**2)
            update = first / (1 - beta_1**taken) / ((second / (1 - beta_2**taken)).sqrt() + settings.eps)
            if decayed:
                update = update + settings.weight_decay * p.detach()
            if settings.name == "lamb" and decayed and p.detach().norm() > 0 and update.norm() > 0:
                update = update * p.detach().norm() / update.norm()
            p.data -= rate * update
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", worker.CASES)
def test_every_number_of_ranks_and_stage_gives_what_the_formulas_give(saved: dict[str, Path], name: str) -> None:
    weights = expected(name)
    start = MaskedLanguageModel(worker.case(name).model)
    initialize(start, 0, worker.STD)
    for who, directory in saved.items():
        found = checkpoint.Checkpoint(checkpoint.step_path(directory / name, worker.STEPS)).weights()
        for n, p in start.named_parameters():
            moved = (weights[n] - p.detach()).norm()
            assert moved > 0 and (found[n] - weights[n]).norm() <= 2e-5 * moved, f"{n}, {who}"


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_step_is_left_out_and_gradients_are_divided_on_the_device(kind: str) -> None:
    def trained(*steps: tuple[float, float, float | None]) -> dict[str, Any]:
        """After steps of (gradient, found_inf, grad_scale)."""
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 10))
        config = OptimizerConfig(name=kind, weight_decay=0.1)
        optimizer = build_optimizer(config, [weight], CPU)
        optimizer.param_groups[0]["lr"] = 0.1
        for gradient, found_inf, grad_scale in steps:
            weight.grad = torch.arange(10.0) * gradient
            optimizer.found_inf = torch.tensor(float(found_inf))
            optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
            optimizer.step()
        return {"weight": weight.detach(), **optimizer.state[weight]}

    plain = trained((1, 0, None), (2, 0, None))
    for other in (
        trained((1, 0, None), (math.nan, 1, None), (2, 0, None)),
        trained((1, 0, None), (math.inf, 1, math.inf), (2, 0, None), (1e30, 1, 7.0)),
        trained((math.nan, 1, None), (1, 0, None), (2, 0, None)),  # the very first one
        trained((4, 0, 4.0), (4, 0, 2.0)),
    ):
        assert all(torch.equal(other[key], plain[key]) for key in plain)
    assert float(plain["step"]) == 2


def test_lamb_moves_layers_in_proportion_to_their_weights() -> None:
    weights = [torch.nn.Parameter(torch.ones(4) * scale) for scale in (1.0, 100.0, 0.0)]
    optimizer = Lamb(weights, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones(4)
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    moved = [float((weight.detach() - old).norm()) for weight, old in zip(weights, before, strict=True)]
    # ||weights|| x rate; where there are no weights yet, Adam's step of one rate an element.
    assert moved == pytest.approx([0.02, 2.0, 0.02], rel=1e-4)


def test_a_fused_adam_that_can_not_run_is_bad_input_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)  # also where somebody has it
    with pytest.raises(InputError, match=r"optimizer.implementation=apex: apex.optimizers.FusedAdam can't be used: .*apex"):
        build_optimizer(OptimizerConfig(implementation="apex"), [torch.nn.Parameter(torch.zeros(2))], CPU)


def test_one_that_knows_no_verdict_is_told_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for apex: its arguments, its way of counting steps, and nothing of `found_inf`."""

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, adam_w_mode: bool, **others: Any) -> None:
            assert adam_w_mode
            super().__init__(params, {"lr": lr, **others})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for weight in group["params"]:
                    weight.data -= group["lr"] * weight.grad
                    self.state[weight]["exp_avg"] = weight.grad.clone()

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam=FusedAdam))
    config, weight = OptimizerConfig(implementation="apex"), torch.nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(config, [weight], CPU)
    assert isinstance(optimizer, HostJudged) and name_of(config) == "apex.optimizers.FusedAdam"
    group = optimizer.param_groups[0]
    group["lr"] = 1.0
    for gradient, found_inf, expected_weight in [(math.nan, 1.0, 0.0), (6.0, 0.0, -3.0), (1e9, 1.0, -3.0)]:
        weight.grad = torch.full((2,), gradient)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), torch.tensor(2.0)
        optimizer.step()
        assert weight.tolist() == [expected_weight] * 2
    assert group["step"] == 1
    set_steps(optimizer, 7)
    assert group["step"] == 7 and optimizer.state[weight]["step"] == 7


def test_norms_and_biases_are_a_group_without_decay() -> None:
    model = MaskedLanguageModel(worker.case("adamw-0").model)
    config = OptimizerConfig(decay_norms_and_biases=False, weight_decay=0.1)
    wide, narrow = build_optimizer(config, model.parameters(), CPU).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (wide["weight_decay"], narrow["weight_decay"]) == (0.1, 0.0)
    apart = {names[id(parameter)] for parameter in narrow["params"]}
    assert apart == {name for name in names.values() if name.endswith(".bias") or "norm" in name.lower()}
    assert len(apart) + len(wide["params"]) == len(names)
