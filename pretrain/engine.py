"""The DeepSpeed engine of a run."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from data_prep.cli import log
from pretrain import zero_state, zero_step
from pretrain.config import Config
from pretrain.distributed import World
from pretrain.lamb import Lamb, Piece
from pretrain.model import MaskedLanguageModel, set_onednn, set_recomputation
from pretrain.optimizer import HostJudged, build_optimizer, name_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUCKET_ELEMENTS = (
    50_000_000  # of gradients or weights exchanged at once; the default 5e8 allocates 2 GB a rank for any model
)


def build_engine(config: Config, world: World) -> Any:
    """The model, its optimizer and DeepSpeed around them; a collective. The weights are arbitrary: see `zero_state.load`.

    No rank ever holds the fp32 state of the whole model: at stage 3 each module is cut up as soon as it is built, below it
    is built in the dtype of the forward passes. The caller names the last micro batch of each step
    (`engine.set_gradient_accumulation_boundary`) and doesn't let DeepSpeed divide by their number, which may change.

    Raises InputError, on every rank, when one can't use the optimizer that the configuration names.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on stdout that it found no GPU
    import deepspeed  # here: it takes seconds to import, and its logger speaks on stdout, which is ours

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed calls them
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated")
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of what is meant so, such as an optimizer that it doesn't know
    # On a CPU DeepSpeed would compile this at the first start, which takes a minute; only its inference collectives use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dtype, stage = DTYPES[config.train.dtype], config.deepspeed.zero_stage
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,  # nominal: DeepSpeed does nothing with it
        "gradient_clipping": 0.0,  # by the optimizer, in its own pass over the gradients
        "zero_allow_untested_optimizer": True,  # it knows those by name that work with its flat tensors; ours all do
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro batch
        "bf16": {"enabled": config.train.dtype == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3), world.device, _default_dtype(dtype):
        model = MaskedLanguageModel(config.model)
    set_recomputation(model.bert, config.train.activation_checkpointing, config.train.recompute_geglu)
    set_onednn(model, config.train.onednn)
    failure: Exception | None = None
    try:
        optimizer = build_optimizer(config.optimizer, model.parameters(), world.device)
    except Exception as error:
        failure = error
    world.agree(failure)
    if world.is_first:
        waits = "; every step the host waits for the device, to tell it what to leave out"
        log(f"optimizer: {name_of(config.optimizer)}{waits if isinstance(optimizer, HostJudged) else ''}")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if stage == 0 and world.size == 1:
        engine.enable_backward_allreduce = False  # it would copy all gradients, to sum them over one rank
    zero_step.leave_judging_to_us(engine)
    if isinstance(optimizer, Lamb):
        number = {name: index for index, name in enumerate(zero_state.shapes(engine))}
        pieces = ((part.flat, Piece(number[part.name], part.offset, part.numel)) for part in zero_state.parts(engine))
        optimizer.lay_out(pieces, len(number), shared=stage > 0 and world.size > 1)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
