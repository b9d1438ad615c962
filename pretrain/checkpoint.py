"""Checkpoints free of layout: what was saved by any number of ranks at any ZeRO stage is read by any other.

    RUN_DIR/checkpoints/step-000001000/
      MANIFEST.json                  written last; sha256 and size of every file, which fragment is where, and `state`
      rank-00000-of-00002.safetensors   fp32 fragments "<kind>/<start>/<parameter>" of 1-D, row-major flattened parameters

Kinds are `weight`, and `exp_avg`, `exp_avg_sq` where there is an optimizer state. A step is written under a temporary name
that carries the id of this life of the run, everything is hashed and fsynced, all ranks meet, and rank 0 renames: a step
that has its name is whole. Nothing is pickled and nothing needs converting.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.cli import InputError, dump_json, fsync_directory, log, write_atomically
from data_prep.dataset import safe_join
from data_prep.storage import file_sha256

FORMAT_VERSION = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """A stretch of one parameter, flattened row-major, that one rank owns."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # kind -> fp32 [numel]


def save(
    run_dir: Path,
    *,
    step: int,
    life: str,
    fragments: Iterable[Fragment],
    shapes: dict[str, tuple[int, ...]],
    model: dict[str, Any],
    state: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write one step and commit it; every rank calls this with the fragments it owns.

    Args:
        life: id of this process life of the run, equal on all ranks.
        shapes: shape of every parameter; together the fragments of all ranks must cover each exactly once.
        model: the model section of the configuration, so that a checkpoint explains itself.
        state: everything else that can change a later loss; any JSON.
        barrier: returns when all ranks have called it.

    Raises ValueError when the fragments don't cover the parameters.
    """
    final = run_dir / "checkpoints" / f"step-{step:09d}"
    temporary = final.with_name(f"{final.name}.tmp-{life}")
    temporary.mkdir(parents=True, exist_ok=True)  # by every rank: on a network disk others see it late
    _write_rank(temporary, rank, world_size, fragments)
    barrier()
    if rank == 0:
        _commit(temporary, final, step, shapes, model, state, world_size)
    barrier()
    return final


def _write_rank(directory: Path, rank: int, world_size: int, fragments: Iterable[Fragment]) -> None:
    """This rank's tensors, and a listing that rank 0 merges into the manifest."""
    path = directory / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    tensors, listing = {}, []
    for fragment in fragments:
        numel = fragment.tensors["weight"].numel()
        listing.append((fragment.name, fragment.start, numel, sorted(fragment.tensors)))
        for kind, tensor in fragment.tensors.items():
            tensors[_key(kind, fragment.start, fragment.name)] = tensor.detach().cpu().contiguous()
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors makes 0600; other users of a cluster read our files
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    entry = {"file": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size, "fragments": listing}
    write_atomically(path.with_suffix(".json"), dump_json(entry))


def _commit(
    temporary: Path,
    final: Path,
    step: int,
    shapes: dict[str, tuple[int, ...]],
    model: dict[str, Any],
    state: dict[str, Any],
    world_size: int,
) -> None:
    files: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {name: {"shape": list(shape), "fragments": []} for name, shape in shapes.items()}
    for listing_path in sorted(temporary.glob("rank-*.json")):
        entry = json.loads(listing_path.read_bytes())
        files[entry["file"]] = {"sha256": entry["sha256"], "bytes": entry["bytes"]}
        for name, start, numel, kinds in entry["fragments"]:
            fragment = {"file": entry["file"], "start": start, "numel": numel, "kinds": kinds}
            parameters[name]["fragments"].append(fragment)
        listing_path.unlink()
    for name, parameter in parameters.items():
        parameter["fragments"].sort(key=lambda fragment: fragment["start"])
        end = 0
        for fragment in parameter["fragments"]:
            if fragment["start"] != end:
                raise ValueError(f"{name}: fragments leave a gap or overlap at element {end}")
            end += fragment["numel"]
        if end != math.prod(parameter["shape"]):
            raise ValueError(f"{name}: fragments cover {end} of {math.prod(parameter['shape'])} elements")
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "model": model,
        "state": state,
        "files": files,
        "parameters": parameters,
    }
    manifest["manifest_sha256"] = _manifest_sum(manifest)
    write_atomically(temporary / "MANIFEST.json", dump_json(manifest))
    os.rename(temporary, final)
    fsync_directory(final.parent)
    write_atomically(final.parent / "LATEST", f"{final.name}\n".encode())


def _key(kind: str, start: int, name: str) -> str:
    return f"{kind}/{start}/{name}"


def _manifest_sum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(dump_json(content)).hexdigest()


class DamagedError(InputError):
    """A committed step that is not whole any more."""


class Checkpoint:
    """A committed step. Opening it checks the manifest; `verify()` checks every byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest_path = path / "MANIFEST.json"
        try:
            self.manifest: dict[str, Any] = json.loads(manifest_path.read_bytes())
            whole = self.manifest["manifest_sha256"] == _manifest_sum(self.manifest)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            whole = False  # other errors of the file system may pass, and are no reason to set the step aside
        if not whole:
            raise DamagedError(f"{manifest_path}: missing or damaged")
        version = self.manifest["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(f"{manifest_path}: format_version {version}, this code reads {FORMAT_VERSION}")
        self.step = int(self.manifest["step"])
        self.state: dict[str, Any] = self.manifest["state"]

    def verify(self) -> None:
        """Raise DamagedError naming the first file whose size or sha256 is not the manifest's."""
        for name, entry in self.manifest["files"].items():
            path = safe_join(self.path, name)
            if not path.is_file() or path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
                raise DamagedError(f"{path}: missing or damaged (size or sha256 differs from MANIFEST.json)")

    @property
    def has_optimizer_state(self) -> bool:
        """False for an imported model, which starts with fresh moments."""
        fragments = (f for p in self.manifest["parameters"].values() for f in p["fragments"])
        return all(set(fragment["kinds"]) >= set(KINDS) for fragment in fragments)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter or moment, fp32, read from the fragments they lie in.

        Raises InputError when the checkpoint has no such parameter.
        """
        if name not in self.manifest["parameters"]:
            raise InputError(f"{self.path}: no parameter {name}; it belongs to another model")
        pieces = []
        for fragment in self.manifest["parameters"][name]["fragments"]:
            begin = max(start, fragment["start"])
            end = min(start + numel, fragment["start"] + fragment["numel"])
            if begin >= end:
                continue
            path = safe_join(self.path, fragment["file"])
            try:
                with safe_open(path, framework="pt") as file:
                    piece = file.get_slice(_key(kind, fragment["start"], name))
                    pieces.append(piece[begin - fragment["start"] : end - fragment["start"]])
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: can't be read: {error}") from None
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def weights(self) -> dict[str, Tensor]:
        """All parameters, fp32, in their shapes, on the CPU."""
        parameters = self.manifest["parameters"].items()
        return {n: self.read(n, "weight", 0, math.prod(p["shape"])).view(p["shape"]) for n, p in parameters}


def steps(run_dir: Path) -> list[int]:
    """Committed steps, ascending."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:09d}"


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest step that verifies, or None where no step was ever committed. Changes nothing.

    Damaged steps are named in the log. Raises InputError when there are steps but none is whole, or when one was written in
    another format: starting again from nothing is for a person to decide.
    """
    committed = steps(run_dir)
    for step in reversed(committed):
        try:
            checkpoint = Checkpoint(step_path(run_dir, step))
            checkpoint.verify()
            return checkpoint
        except DamagedError as error:
            log(f"skipping a damaged checkpoint: {error}")
    if committed:
        raise InputError(
            f"{run_dir / 'checkpoints'}: {len(committed)} steps, none whole, nothing was changed; "
            "restore one, or start again in another run_dir"
        )
    return None


def recover(run_dir: Path, life: str) -> Checkpoint | None:
    """What a starting run does: find the newest whole step, set damaged ones aside, remove what dead lives left."""
    checkpoint = newest(run_dir)
    for step in steps(run_dir):
        if checkpoint is not None and step > checkpoint.step:
            path = step_path(run_dir, step)
            path.rename(path.with_name(f"{path.name}.damaged-{life}"))
    for leftover in sorted((run_dir / "checkpoints").glob("step-*.tmp-*")):
        shutil.rmtree(leftover)
    return checkpoint


def retain(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` steps; called after a commit, so a successor exists.

    A step loses its name first, so that a half-deleted one is never taken for whole. A file system that refuses is no
    reason to stop training: the next start removes what is left.
    """
    for step in steps(run_dir)[:-keep_last]:
        path = step_path(run_dir, step)
        try:
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp-discarded")))
        except OSError as error:
            log(f"{path}: can't be removed now: {error}")
