"""Which implementations a run computes with, of fused operations and products: chosen at its start, alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_prep.cli import InputError, log
from kernels import choice
from kernels.choice import Sizes
from pretrain import onednn
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.engine import DTYPES
from pretrain.model import ModelConfig


def sizes_of(model: ModelConfig, longest: int) -> Sizes:
    """What the kernels have to cope with; `longest` sequence in tokens."""
    return Sizes(
        model.hidden_size,
        model.num_attention_heads,
        model.intermediate_size,
        model.vocab_size,
        longest,
        model.attention_probs_dropout_prob,
    )


def choose(config: Config, world: World, longest: int) -> dict[str, str]:
    """Try, choose for this process and log; returns the name of what computes each operation. A collective.

    What one rank can't use, none does. InputError for an implementation that the configuration names and that can't run.
    """
    requests = config.kernels.model_dump()
    found = choice.obstacles(requests, world.device, DTYPES[config.train.dtype], sizes_of(config.model, longest))
    mine = bool(found)
    every = [(operation, name) for operation, names in choice.OPERATIONS.items() for name in names if name != "torch"]
    ranks = world.sum(*((pair in found) for pair in every))
    differ = False
    for (operation, name), count in zip(every, ranks, strict=True):
        if 0 < count < world.size:
            differ = True
            found.setdefault((operation, name), "another rank can't use it; see what that rank's log says")
            # What comes after it in the order was tried on some ranks only.
            found |= {pair: "the ranks differ" for pair in every if pair[0] == operation and pair not in found}
    with _unavailable_is_bad_input():
        names = choice.use(requests, found, world.device)
    if world.is_first or (mine and differ):
        _log(choice.describe(names, found))
    return names


def choose_onednn(config: Config, world: World) -> None:
    """Try oneDNN on every rank where `train.onednn` asks for it, and say so in the log. A collective.

    Raises InputError, on all ranks, where one of them can't.
    """
    if not config.train.onednn:
        return
    reason = onednn.obstacle(world.device)
    world.agree(InputError(f"train.onednn=true: {reason}; train.onednn=false does without") if reason else None)
    if world.is_first:
        log("linear layers: oneDNN")


def choose_alone(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, longest: int, implementation: str
) -> dict[str, str]:
    """The same for a process of its own, which takes one implementation, or `auto`, for all operations."""
    requests = dict.fromkeys(choice.OPERATIONS, implementation)
    with _unavailable_is_bad_input():
        _log(choice.choose(device, dtype, sizes_of(model, longest), requests))
    return choice.implementations()


@contextmanager
def _unavailable_is_bad_input() -> Iterator[None]:
    try:
        yield
    except choice.Unavailable as error:
        raise InputError(str(error)) from None


def _log(lines: list[str]) -> None:
    for line in lines:
        log(line)
