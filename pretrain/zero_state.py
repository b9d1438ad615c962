"""What a rank owns of the fp32 weights and the optimizer's moments under each ZeRO stage, as fragments of named parameters.

DeepSpeed keeps fp32 state in flat buffers: stage 0 has none (each parameter is its own, on every rank), stages 1 and 2 one
buffer a parameter group, of which each rank holds a slice that may begin or end inside a parameter; stage 3 cuts every
parameter into equal parts, the last one padded. This module is the only one that knows it (deepspeed 0.19:
`utils/tensor_fragment.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint import Checkpoint, Fragment
from pretrain.model import initial_values
from pretrain.optimizer import set_steps


class Part(NamedTuple):
    """Elements [start, start + numel) of parameter `name` lie at `offset` of the optimizer's tensor `flat`."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def parts(engine: Any) -> Iterator[Part]:
    """What this rank holds, parameter by parameter in the model's order; nothing of what it holds no element of."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            yield Part(name, 0, parameter.numel(), parameter, 0)
        elif stage in (1, 2):
            mapping = parameter._hp_mapping  # None where another rank owns the whole parameter
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                yield Part(name, here.start, here.numel, flat, there.start)
        else:
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * padded
            numel = min(padded, parameter.ds_numel - start)
            if numel > 0:
                yield Part(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset)


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that was given to DeepSpeed; it works on the tensors of `parts`."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _state(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of one of its tensors, created here if no step has been taken yet."""
    state: dict[str, Tensor] = inner_optimizer(engine).state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    return state


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter; tied ones stand once."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def owned_fragments(engine: Any, rank: int, ranks: int) -> Iterator[Fragment]:
    """Views of what this rank saves. At stage 0 every rank holds everything and they take turns."""
    for number, part in enumerate(parts(engine)):
        if engine.zero_optimization_stage() == 0 and number % ranks != rank:
            continue
        state = _state(engine, part.flat)
        moments = {kind: part.of(state[kind]) for kind in ("exp_avg", "exp_avg_sq")}
        yield Fragment(part.name, part.start, {"weight": part.of(part.flat), **moments})


class InitialState:
    """What a run starts from, in the form of a checkpoint without moments. Parameters are read in the model's order."""

    has_optimizer_state = False

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, std: float) -> None:
        self.state: dict[str, Any] = {}
        self._values = initial_values(shapes, seed, std)
        self._name, self._value = "", torch.empty(0)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        while self._name != name:  # a rank that owns nothing of a parameter draws it too: one generator draws them all
            self._name, self._value = next(self._values)
        return self._value.view(-1)[start : start + numel]


def load(engine: Any, source: Checkpoint | InitialState) -> None:
    """Read this rank's fragments from a checkpoint of any layout, and refresh the weights that the model computes with.

    A source without moments (an imported checkpoint, a fresh start) leaves them at zero. Raises InputError when a parameter
    is missing.
    """
    has_moments = source.has_optimizer_state  # asked once: it is a long list
    for part in parts(engine):
        part.of(part.flat).copy_(source.read(part.name, "weight", part.start, part.numel))
        state = _state(engine, part.flat)
        for kind in ("exp_avg", "exp_avg_sq"):
            if has_moments:
                part.of(state[kind]).copy_(source.read(part.name, kind, part.start, part.numel))
            else:
                part.of(state[kind]).zero_()
    set_steps(inner_optimizer(engine), source.state.get("optimizer_step", 0))
    _refresh_model_weights(engine)


def _refresh_model_weights(engine: Any) -> None:
    """Copy the fp32 buffers into the tensors that forward passes read, as DeepSpeed does at the end of a step."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones stay gathered: give back the stale copy, gather the new one
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
