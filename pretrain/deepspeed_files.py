"""Reads raw DeepSpeed checkpoints, as `engine.save_checkpoint(dir)` writes them, into fragments of named parameters.

    DIR/latest                                     names the newest tag
    DIR/TAG/mp_rank_00_model_states.pt             names and shapes; at ZeRO stage 0 everything
    DIR/TAG/zero_pp_rank_0_mp_rank_00_model_states.pt      the same at stage 3
    DIR/TAG/[bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt   what rank N held: flat fp32 weights and Adam moments

They are pickles from a stranger: torch's restricted unpickler reads them, and the few classes of DeepSpeed that it meets
become inert objects, so nothing of DeepSpeed is imported. Files are mapped into memory; fragments are views of them. The
layouts are those of deepspeed 0.19, and `zero_state.py` has their counterpart in a live engine.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data_prep.cli import InputError, log, one_line
from pretrain import checkpoint
from pretrain.checkpoint import Fragment
from pretrain.model import ModelConfig
from pretrain.pretrained import (
    EMBEDDINGS,
    FLOATS,
    TIED,
    check_names_and_shapes,
    check_tokenizer,
    parse_config,
    read_config,
)

MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "_mp_rank_00_optim_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")

Shapes = dict[str, tuple[int, ...]]


class _Inert:
    """Stands for a class whose content is of no use here."""


ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """A checkpoint whose layout was checked and whose tensors have not been read yet."""

    config: ModelConfig
    tokenizer: Path
    fragments: Iterator[Fragment]  # cover every parameter once; InputError where a value is not finite
    optimizer_state: dict[str, int]  # optimizer_step: updates that Adam has counted; empty: the fragments have no moments
    source: dict[str, Any]  # kind "deepspeed", path, tag, zero_stage, ranks, global_steps


class _Contents(NamedTuple):
    """The flat buffers of all ranks: `ranks[rank][buffer]` is kind -> 1-D tensor."""

    ranks: list[list[dict[str, Tensor]]]
    shapes: list[Shapes]  # of the parameters in each buffer, in their order
    gaps: list[list[int]] | None = None  # elements after each parameter that belong to none (`parameter_alignment`)
    steps: frozenset[int] = frozenset()  # Adam's count of updates, of all buffers; empty without moments


class _Piece(NamedTuple):
    """Elements [start, start + numel) of parameter `name` lie at `offset` of a rank's buffer."""

    name: str
    start: int
    numel: int
    rank: int
    buffer: int
    offset: int


def is_deepspeed(directory: Path) -> bool:
    """Whether it is the directory given to `save_checkpoint`, or the folder of a tag in it."""
    return (directory / "latest").is_file() or any(directory.glob(f"*{MODEL_STATES}"))


def read_deepspeed(directory: Path, like: Path | None = None) -> DeepSpeedCheckpoint:
    """Open a checkpoint of ZeRO stage 0 to 3, any number of ranks, with weights of any precision.

    Args:
        directory: has `latest`, or is the folder of a tag.
        like: run directory or Hugging Face directory of the same architecture and tokenizer, which DeepSpeed doesn't
            store; None: config.json and tokenizer.json lie in `directory` or beside it.

    Raises InputError naming the file, and the class or key, that is missing, not allowed, damaged or of another model.
    """
    config, tokenizer = _architecture(directory, like)
    folder = _tag_folder(directory)
    found = [folder / name for name in (MODEL_STATES, f"zero_pp_rank_0_{MODEL_STATES}") if (folder / name).is_file()]
    if len(found) != 1:
        what = "saves of two runs mixed" if found else f"no {MODEL_STATES}, and no zero_pp_rank_0_{MODEL_STATES}"
        raise InputError(f"{folder}: {what}; expected what engine.save_checkpoint writes")
    path = found[0]
    model = _load(path)
    with _explained(path):
        if model["mp_world_size"] != 1:
            raise InputError(f"{path}: saved under model parallelism, which is not read; save it without")
        if model["param_shapes"] is None:
            stage, contents, ranks = 0, _replicated(model, path), model["dp_world_size"]
        else:
            stage, contents = _partitioned(model, folder)
            ranks = len(contents.ranks)
        shapes = {name: shape for buffer in contents.shapes for name, shape in buffer.items()}
        check_names_and_shapes({name: torch.empty(s, device="meta") for name, s in shapes.items()}, config, path)
        pieces = list(_interleaved(contents) if stage == 3 else _concatenated(contents))
        _check_pieces(pieces, contents, folder)
        source = {
            "kind": "deepspeed",
            "path": str(directory),
            "tag": folder.resolve().name,
            "zero_stage": stage,
            "ranks": int(ranks),
            "global_steps": int(model["global_steps"]),
        }
    if not contents.steps:
        log(f"{folder}: has no Adam moments that can be used; they start at zero")
    state = {"optimizer_step": max(contents.steps)} if contents.steps else {}
    return DeepSpeedCheckpoint(config, tokenizer, _fragments(contents, pieces, folder), state, source)


def _architecture(directory: Path, like: Path | None) -> tuple[ModelConfig, Path]:
    """Configuration and tokenizer file of `like`, or of a config.json in the checkpoint's directory or beside it."""
    if like is None:
        places = (directory, directory.resolve().parent)
        like = next((place for place in places if (place / "config.json").is_file()), None)
        if like is None:
            raise InputError(
                f"{directory}: DeepSpeed stores no configuration and no tokenizer; name a directory of the same model with "
                "--like, or put its config.json and tokenizer.json here"
            )
    if (like / "checkpoints").is_dir():
        newest = checkpoint.newest(like)
        if newest is None:
            raise InputError(f"{like}: has no checkpoint that says which architecture it is; name another directory")
        config = parse_config(newest.manifest["model"], newest.path / "MANIFEST.json")
    elif (like / "config.json").is_file():
        config = parse_config(read_config(like / "config.json"), like / "config.json")
    else:
        raise InputError(f"{like}: neither a run directory (no checkpoints/) nor a Hugging Face directory (no config.json)")
    check_tokenizer(like / "tokenizer.json", config)
    return config, like / "tokenizer.json"


def _tag_folder(directory: Path) -> Path:
    latest = directory / "latest"
    if not latest.is_file():
        return directory
    tag = latest.read_bytes()[:256].decode(errors="replace").strip()
    if not tag or tag in (".", "..") or tag != Path(tag).name:
        raise InputError(f"{latest}: {tag!r} is not the name of a folder beside it; name the folder of the tag itself")
    if not (directory / tag).is_dir():
        raise InputError(f"{latest}: names {tag!r}, and there is no such folder beside it; name the folder of a tag itself")
    return directory / tag


def _load(path: Path) -> Any:
    """The content of a file, its tensors mapped; InputError. Nothing in it is executed."""
    with safe_globals(ALLOWED):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise InputError(f"{path}: not found; copy the folder whole, every rank has written its own file") from None
        except pickle.UnpicklingError:
            try:
                foreign = ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
            except Exception:  # it parses a pickle that may be anything
                foreign = ""
            raise InputError(
                f"{path}: refused: it holds {foreign or 'more than tensors and plain values'}, which could run code here; "
                "save it without client_state, or where you trust it run zero_to_fp32.py and import what that writes"
            ) from None
        except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{path}: can't be read as a PyTorch file: {one_line(error)}") from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A file may hold anything under the keys that are looked up here: say so in one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: not laid out as by deepspeed 0.19 ({what}); load and save it with that version") from None


def _canonical(name: str) -> str:
    """Our name of a parameter, which may stand under its wrapper's, or under that of the decoder it is tied to."""
    name = name.removeprefix("module.")
    return EMBEDDINGS if name == TIED else name


def _partitioned(model: Any, folder: Path) -> tuple[int, _Contents]:
    """What the ranks held under ZeRO, and the stage."""
    pattern = f"zero_pp_rank_*{OPTIMIZER_STATES}"
    prefixes = {path.name.partition("zero_pp_rank_")[0] for path in folder.glob(f"*{pattern}")}
    if len(prefixes) != 1:
        what = "saves of two runs mixed: both" if prefixes else "no"
        raise InputError(f"{folder}: {what} {' and '.join(sorted(p + pattern for p in prefixes)) or pattern}")
    (prefix,) = prefixes
    stage, count, gaps = 0, 1, None
    ranks: list[list[dict[str, Tensor]]] = []
    steps: set[int] = set()
    while len(ranks) < count:
        path = folder / f"{prefix}zero_pp_rank_{len(ranks)}{OPTIMIZER_STATES}"
        held = _load(path)
        with _explained(path):
            held = held["optimizer_state_dict"]
            count = max(held["partition_count"]) if isinstance(held["partition_count"], list) else held["partition_count"]
            stage, gaps = int(held.get("zero_stage", 1)), held.get("param_alignment_paddings")
            weights = held["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
            adam = held["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
            states = adam["state"] if isinstance(adam, dict) else dict(enumerate(adam))  # a list: `elastic_checkpoint`
            ranks.append([_with_moments(flat, states.get(number), steps) for number, flat in enumerate(weights)])
    shapes = []
    for group in model["param_shapes"]:
        shapes.append({_canonical(name): tuple(shape) for name, shape in group.items()})
        if len(shapes[-1]) != len(group):
            raise InputError(f"{folder}: {TIED} and {EMBEDDINGS} were trained apart; in this model the two are one")
    return stage, _only_common_kinds(_Contents(ranks, shapes, gaps, frozenset(steps)))


def _with_moments(weight: Tensor, state: Any, steps: set[int]) -> dict[str, Tensor]:
    """One buffer, flat, with its moments where Adam has any; their count of updates is added to `steps`."""
    kinds = {"weight": weight.flatten()}
    if isinstance(state, dict) and state.keys() >= {"step", *MOMENTS}:
        steps.add(int(state["step"]))
        kinds |= {kind: state[kind].flatten() for kind in MOMENTS}
    return kinds


def _only_common_kinds(contents: _Contents) -> _Contents:
    """Without moments, unless all buffers have them."""
    if all(len(kinds) == 3 for buffers in contents.ranks for kinds in buffers):
        return contents
    weights = [[{"weight": kinds["weight"]} for kinds in buffers] for buffers in contents.ranks]
    return contents._replace(ranks=weights, steps=frozenset())


def _replicated(model: Any, path: Path) -> _Contents:
    """Stage 0: each parameter is a buffer of rank 0, or each group is, under DeepSpeed's FusedAdam in half precision.

    The optimizer's tensors carry no names there. They get those of the first usual order that fits all shapes.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in model["module"].items():
        if name in model["buffer_names"]:
            continue
        if not torch.equal(weights.get(_canonical(name), tensor), tensor):  # a state dict has what is tied twice
            raise InputError(f"{path}: {TIED} differs from {EMBEDDINGS}; in this model the two are one")
        weights.setdefault(_canonical(name), tensor)
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    optimizer = model["optimizer"] or {"state": {}, "param_groups": []}
    adam = optimizer.get("optimizer_state_dict", optimizer)
    states = [adam["state"].get(number, {}) for group in adam["param_groups"] for number in group["params"]]
    fused = "fp32_groups_flat" in optimizer
    # In half precision the optimizer has fp32 masters of the weights; in fp32 it has nothing but Adam's state.
    masters = optimizer["fp32_groups_flat"] if fused else [t for group in optimizer.get("fp32_groups", ()) for t in group]
    if not masters:
        states = [state for state in states if "exp_avg" in state]
    sizes = [tuple(tensor.shape) for tensor in masters or [state["exp_avg"] for state in states]]
    for groups in _usual_groups(shapes, adam["param_groups"]):
        buffers: list[Shapes] = [{name: shapes[name] for name in group} for group in groups]
        if not fused:
            buffers = [{name: shape} for buffer in buffers for name, shape in buffer.items()]
        if sizes == [(sum(map(math.prod, b.values())),) if fused else next(iter(b.values())) for b in buffers]:
            steps: set[int] = set()
            tensors = masters or [weights[name] for buffer in buffers for name in buffer]
            rank = [_with_moments(tensor, state, steps) for tensor, state in zip(tensors, states, strict=True)]
            return _only_common_kinds(_Contents([rank], buffers, None, frozenset(steps)))
    if masters:
        log(f"{path}: can't tell which parameter each fp32 master weight is of; took the model's own weights")
    return _Contents([[{"weight": tensor.flatten()} for tensor in weights.values()]], [{n: s} for n, s in shapes.items()])


def _usual_groups(shapes: Shapes, groups: list[dict[str, Any]]) -> Iterator[list[list[str]]]:
    """How training code gives parameters to an optimizer: by name, all in one group, or vectors apart, not to be decayed."""
    if groups and all("param_names" in group for group in groups):
        yield [[_canonical(name) for name in group["param_names"]] for group in groups]
    yield [list(shapes)]
    vectors = [name for name, shape in shapes.items() if len(shape) < 2]
    not_decayed = [name for name in shapes if "bias" in name or "LayerNorm.weight" in name]  # BERT's, with its omission
    for apart in (vectors, not_decayed):
        others = [name for name in shapes if name not in apart]
        yield [others, apart]
        yield [apart, others]


def _concatenated(contents: _Contents) -> Iterator[_Piece]:
    """Stages 1 and 2: a buffer is the parameters end to end, cut among the ranks anywhere, padding removed or last."""
    for buffer, shapes in enumerate(contents.shapes):
        gaps = contents.gaps[buffer] if contents.gaps else [0] * len(shapes)
        position = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            end, left = position + math.prod(shape), 0
            for rank, buffers in enumerate(contents.ranks):
                right = left + buffers[buffer]["weight"].numel()
                begin, stop = max(position, left), min(end, right)
                if begin < stop:
                    yield _Piece(name, begin - position, stop - begin, rank, buffer, begin - left)
                left = right
            position = end + gap


def _interleaved(contents: _Contents) -> Iterator[_Piece]:
    """Stage 3: every parameter is cut into equal parts, one a rank, the last one padded."""
    for buffer, shapes in enumerate(contents.shapes):
        offset = 0
        for name, shape in shapes.items():
            part = -(-math.prod(shape) // len(contents.ranks))
            for rank in range(len(contents.ranks)):
                numel = min(part, math.prod(shape) - rank * part)
                if numel > 0:
                    yield _Piece(name, rank * part, numel, rank, buffer, offset)
            offset += part


def _check_pieces(pieces: list[_Piece], contents: _Contents, folder: Path) -> None:
    """Raise InputError unless the pieces lie inside their buffers and are the parameters, each whole and once."""
    missing = {name: math.prod(shape) for buffer in contents.shapes for name, shape in buffer.items()}
    for piece in pieces:
        missing[piece.name] -= piece.numel
        for kind, flat in contents.ranks[piece.rank][piece.buffer].items():
            if flat.dtype not in FLOATS or piece.offset + piece.numel > flat.numel():
                raise InputError(f"{folder}: rank {piece.rank}: {kind} of {piece.name} is {flat.dtype} or too short")
    for name, numel in missing.items():
        if numel:
            raise InputError(f"{folder}: {abs(numel)} elements of {name} are {'missing' if numel > 0 else 'too many'}")
    if len(contents.steps) > 1:
        raise InputError(f"{folder}: Adam has counted {sorted(contents.steps)} updates; ranks are of different saves")


def _fragments(contents: _Contents, pieces: list[_Piece], folder: Path) -> Iterator[Fragment]:
    for piece in pieces:
        tensors = {}
        for kind, flat in contents.ranks[piece.rank][piece.buffer].items():
            tensors[kind] = flat.narrow(0, piece.offset, piece.numel).to(torch.float32)
            if not tensors[kind].isfinite().all():
                raise InputError(f"{folder}: {kind} of {piece.name} holds a value that is not a number or not finite")
        yield Fragment(piece.name, piece.start, tensors)
