"""The encoder's layers under torch.compile: one graph for all of them, any number of tokens, our operations inside.

On a GPU the Triton kernels stay what they are (custom operations that Inductor calls) and the rest of a layer is fused
around them; on a CPU the plain operations themselves are, which PyTorch would compute one after the other. A graph break is
an error (`fullgraph`), so nothing is left out silently. At ZeRO stage 3 layers can't be compiled: DeepSpeed's hooks, which
gather weights, can't be part of a graph.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_prep.cli import InputError, log
from kernels.random import fork, root_key
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.engine import DTYPES, build_engine
from pretrain.implementations import choose, choose_onednn
from pretrain.model import Encoder, Linear, ModelConfig, Packed, initialize, set_onednn, set_recomputation

# Of `compare_compiled`: compiled and plain layers round at other places.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_LENGTHS = (5, 3, 7), (9, 14)  # tokens of the sequences of the trial's batches: other sizes for what is compiled by then


def prepare_engine(config: Config, world: World, longest: int) -> tuple[Any, dict[str, str]]:
    """Choose who computes what, and build the engine that does; a collective.

    Args:
        longest: sequence of the data, in tokens.

    Returns:
        DeepSpeed's engine, and the name of what computes each operation, the layers around them (`layers`) and their
        products (`linear`).
    """
    names = choose(config, world, longest)
    choose_onednn(config, world)
    compiled = choose_compilation(config, world)
    engine = build_engine(config, world)
    if compiled:
        compile_layers(engine.module.bert)
    used = {module.onednn for module in engine.module.modules() if isinstance(module, Linear)}
    layers, linear = "torch.compile" if compiled else "torch", "onednn" if used == {True} else "torch"
    return engine, names | {"layers": layers, "linear": linear}


def compile_layers(encoder: Encoder) -> None:
    """Compile every layer, at its first call. They share one graph a kind of call, because they differ in weights alone."""
    import torch._dynamo

    # Layers also differ in the numbers of their dropout sites: without this, each would be compiled for its own.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # Sizes of 0 and 1 get graphs of their own, and so do validation and batches of equal lengths: more kinds of call than
    # the 8 after which it would give up, in the middle of a run.
    torch._dynamo.config.recompile_limit = 64
    for layer in encoder.encoder.layer:
        layer.compile(dynamic=True, fullgraph=True)


def choose_compilation(config: Config, world: World) -> bool:
    """Whether layers will be compiled, after a trial on every rank; said in the log. A collective.

    Raises InputError, on all ranks, where `train.compile=true` and one of them can't.
    """
    if not config.train.compile:
        return False
    reason = _obstacle(config, world.device)
    failure = reason and InputError(f"train.compile=true: {reason}; train.compile=false does without")
    world.agree(failure or None)
    if world.is_first:
        log("layers: torch.compile")
    return True


def _obstacle(config: Config, device: torch.device) -> str | None:
    """Why layers can't be compiled here, or None. Compiles one layer, which the others will share."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "there is no C++ compiler (c++, g++ or clang++)"
    try:
        train = config.train
        off = compare_compiled(config.model, device, DTYPES[train.dtype], train.recompute_geglu, train.onednn)
    except Exception as error:  # a compiler has many ways to fail, and any of them is a reason
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    tolerance = TOLERANCES[DTYPES[config.train.dtype]]
    return None if off <= tolerance else f"a compiled layer's gradients are off by {off:.1e}, more than {tolerance:.0e}"


def compare_compiled(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, recompute_geglu: bool = False, onednn: bool = False
) -> float:
    """Norm of the difference of the gradients of an encoder of two layers, compiled and as it is, relative to their norm."""
    encoder = Encoder(model.model_copy(update={"num_hidden_layers": 2, "vocab_size": 16}))
    initialize(encoder, 0, model.hidden_size**-0.5)  # of a size with which every part weighs in the gradients
    encoder.to(device=device, dtype=dtype)
    set_recomputation(encoder, layers=False, geglu=recompute_geglu)
    set_onednn(encoder, onednn)
    plain = [_gradients(encoder, lengths, device) for lengths in _LENGTHS]
    compile_layers(encoder)
    compiled = [_gradients(encoder, lengths, device) for lengths in _LENGTHS]
    return max(float((a - b).norm() / a.norm()) for a, b in zip(plain, compiled, strict=True))


def _gradients(encoder: Encoder, lengths: Sequence[int], device: torch.device) -> Tensor:
    """All of them end to end, of a loss that is no symmetric function of the states at every third token."""
    tokens_t = torch.arange(sum(lengths), device=device)
    batch = Packed(
        ids_t=tokens_t % 16,
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        max_seqlen=max(lengths),
        dropout_keys_t=fork(root_key(0, 1), tokens_t),
    )
    states_md = encoder(batch, tokens_t[::3]).float()
    loss = (states_md * torch.linspace(-1, 1, states_md.shape[1], device=states_md.device)).sum()
    return torch.cat([gradient.flatten().float() for gradient in torch.autograd.grad(loss, list(encoder.parameters()))])
