"""Checkpoints free of layout: what was saved by any number of ranks at any ZeRO stage is read by any other.

    RUN_DIR/checkpoints/step-000001000/
      MANIFEST.json                  written last; sha256 and size of every file, which fragment is where, and `state`
      rank-00000-of-00002.safetensors   fp32 fragments "<kind>/<start>/<parameter>" of 1-D, row-major flattened parameters

Kinds are `weight`, and `exp_avg`, `exp_avg_sq` where there is an optimizer state. A step is written under a temporary name
that carries the id of this life of the run, everything is hashed and fsynced, all ranks meet, and rank 0 renames: a step
that has its name is whole. Nothing is pickled and nothing needs converting. `saver.py` does it while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.cli import InputError, dump_json, fsync_directory, log, one_line, write_atomically
from data_prep.dataset import safe_join
from data_prep.storage import file_sha256

FORMAT_VERSION = 1
PREFIX, TEMPORARY = "step-", ".tmp-"
CHUNK_BYTES = 1 << 22  # hashed and written at a time, while it is in the processor's cache
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
) -> Path:
    """Write and commit one step from a single process that has all the fragments; see `write_rank` and `commit`."""
    directory = temporary_path(run_dir, step, life)
    directory.mkdir(parents=True, exist_ok=True)
    return commit(directory, [write_rank(directory, 0, 1, fragments)], shapes, model, state)


def write_rank(directory: Path, rank: int, world_size: int, fragments: Iterable[Fragment]) -> dict[str, Any]:
    """Write this rank's tensors, durably; returns its part of the manifest, for `commit`.

    The sum is made of the bytes on their way to the file: what is damaged there later, or never arrives, doesn't fit it.
    """
    path = directory / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    tensors, listing = {}, []
    for fragment in fragments:
        numel = fragment.tensors["weight"].numel()
        listing.append((fragment.name, fragment.start, numel, sorted(fragment.tensors)))
        for kind, tensor in fragment.tensors.items():
            tensors[_key(kind, fragment.start, fragment.name)] = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256()
    try:
        with path.open("wb") as stream:
            for piece in _safetensors(tensors):
                digest.update(piece)
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
    except OSError:
        path.unlink(missing_ok=True)  # a full disk needs the room
        raise
    fsync_directory(directory)
    return {"file": path.name, "sha256": digest.hexdigest(), "bytes": size, "fragments": listing}


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of fp32 vectors: length of the header, header (JSON, padded to 8 bytes), data.

    Written here because the library can't hash what it writes (github.com/huggingface/safetensors, "Format").
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        data = tensor.numpy().view(np.uint8).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def commit(
    directory: Path,
    listings: list[dict[str, Any]],
    shapes: dict[str, tuple[int, ...]],
    model: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """Give a step that all ranks have written its name, and return it. From the rename on it is one to resume from.

    Args:
        directory: the step's `temporary_path`.
        listings: what `write_rank` returned on each rank.
        shapes: shape of every parameter; together the fragments of all ranks must cover each exactly once.
        model: the model section of the configuration, so that a checkpoint explains itself.
        state: everything else that can change a later loss; any JSON.

    Raises ValueError when the fragments don't cover the parameters.
    """
    final = directory.with_name(directory.name.partition(TEMPORARY)[0])
    files: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {name: {"shape": list(shape), "fragments": []} for name, shape in shapes.items()}
    for entry in listings:
        files[entry["file"]] = {"sha256": entry["sha256"], "bytes": entry["bytes"]}
        for name, start, numel, kinds in entry["fragments"]:
            fragment = {"file": entry["file"], "start": start, "numel": numel, "kinds": kinds}
            parameters[name]["fragments"].append(fragment)
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
        "step": int(final.name[len(PREFIX) :]),
        "world_size": len(listings),
        "model": model,
        "state": state,
        "files": files,
        "parameters": parameters,
    }
    manifest["manifest_sha256"] = _manifest_sum(manifest)
    write_atomically(directory / "MANIFEST.json", dump_json(manifest))
    os.rename(directory, final)
    fsync_directory(final.parent)
    _name_latest(final)
    return final


def _name_latest(path: Path) -> None:
    write_atomically(path.parent / "LATEST", f"{path.name}\n".encode())


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

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Raise DamagedError naming the first file whose size or sha256 is not the manifest's; ranks share the files."""
        for name, entry in sorted(self.manifest["files"].items())[rank::ranks]:
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
    names = [path.name for path in (run_dir / "checkpoints").glob(f"{PREFIX}*") if path.is_dir()]
    return sorted(int(name[len(PREFIX) :]) for name in names if name[len(PREFIX) :].isdigit())


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"{PREFIX}{step:09d}"


def temporary_path(run_dir: Path, step: int, life: str) -> Path:
    """Where a step is written; `life` is the id of this process life of the run, equal on all ranks."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:09d}{TEMPORARY}{life}"


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
        raise none_whole(run_dir, committed)
    return None


def none_whole(run_dir: Path, committed: list[int]) -> InputError:
    return InputError(
        f"{run_dir / 'checkpoints'}: {len(committed)} steps, none whole, nothing was changed; "
        "restore one, or start again in another run_dir"
    )


def set_aside(run_dir: Path, newer_than: int, why: str, life: str) -> None:
    """Rename the steps that a starting run can't or shall not go on from to `step-N.<why>-<life>`."""
    for step in steps(run_dir):
        if step > newer_than:
            path = step_path(run_dir, step)
            path.rename(path.with_name(f"{path.name}.{why}-{life}"))
    if remaining := steps(run_dir):
        _name_latest(step_path(run_dir, remaining[-1]))


def remove_leftovers(run_dir: Path) -> None:
    """Remove what dead lives have begun to write. What can't be removed now is left to the next start."""
    for leftover in sorted((run_dir / "checkpoints").glob(f"{PREFIX}*{TEMPORARY}*")):
        _remove(leftover)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        log(f"{path}: can't be removed now: {one_line(error)}")


def retain(run_dir: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the newest `keep_last` steps and the first step at or after each multiple of `keep_every` (0: none).

    Called when the newest step is whole. A step loses its name first, so that a half-deleted one is never taken for whole.
    """
    committed = steps(run_dir)
    kept = set(committed[-keep_last:])
    if keep_every:
        first = {step // keep_every: step for step in reversed(committed) if step >= keep_every}
        kept |= set(first.values())
    for step in committed:
        if step not in kept:
            path = step_path(run_dir, step)
            try:
                discarded = path.rename(path.with_name(f"{path.name}{TEMPORARY}discarded"))
            except OSError as error:
                log(f"{path}: can't be removed now: {one_line(error)}")
            else:
                _remove(discarded)
