"""Checkpoints while training goes on: a copy in host memory, and a thread that writes, hashes, syncs and commits it.

    training thread   wait for the save before -> copy what this rank owns -> train on
    writer thread     write, hash and fsync the copy -> hand the listing over -> rank 0: have all, commit, tidy up

Ranks meet through the store that they joined each other with, not through collectives: those belong to the training thread
and would have to come in the same order on every rank. A step is committed some time after it was taken, so a run that is
killed meanwhile goes on from the one before; no more than one save is ever under way.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.cli import InputError, log, one_line
from pretrain import checkpoint
from pretrain.checkpoint import Fragment
from pretrain.config import CheckpointConfig
from pretrain.distributed import World
from pretrain.lease import Lease

POLL_SECONDS = 0.05
MARGIN_BYTES = 64 << 20  # left free on the disk for logs, metrics and the manifest


class Saver:
    """Saves steps of one life of a run. Every rank has one; all call `start` and `wait` for the same steps.

    Args:
        lease: of rank 0, which checks it before it commits.

    `failure`: what went wrong in the background on this rank; `wait` raises it.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World, life: str, lease: Lease | None) -> None:
        self._run_dir, self._config, self._world, self._life, self._lease = run_dir, config, world, life, lease
        self._thread: threading.Thread | None = None
        self._copies: dict[tuple[str, str, int], Tensor] = {}
        self.failure: Exception | None = None

    def check_space(self, numel: int) -> None:
        """Raise InputError unless the disk has room for a step of a model of `numel` parameters.

        It can't see quotas; a save that meets one fails, and the step before stays.
        """
        directory = next(path for path in (self._run_dir, *self._run_dir.absolute().parents) if path.is_dir())
        needed, free = len(checkpoint.KINDS) * 4 * numel + MARGIN_BYTES, shutil.disk_usage(directory).free
        if free < needed:
            raise InputError(
                f"{self._run_dir}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, "
                "then run it again"
            )

    def start(
        self,
        step: int,
        fragments: Iterable[Fragment],
        shapes: dict[str, tuple[int, ...]],
        model: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """Copy the fragments that this rank owns and return; they are written in the background.

        The save before must have ended on every rank (`wait`). `shapes`, `model` and `state` are those of
        `checkpoint.commit`. A copy that fails is a `failure` like any other: ranks come to the next collective alike.
        """
        try:
            arguments = (step, self._copy(fragments), shapes, model, state)
        except Exception as error:  # no host memory
            self._fail(step, error)
            return
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint writer", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Give the save under way so long to end."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> None:
        """Return when this rank's part of the save under way is done: on rank 0, when it is committed. Raises `failure`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failure is not None:
            raise self.failure

    def _copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copies in host memory, which is kept and used again: its pages are there, and pinned for a GPU."""
        copied, on_gpu = [], False
        for fragment in fragments:
            tensors = {}
            for kind, tensor in fragment.tensors.items():
                key = (kind, fragment.name, fragment.start)
                on_gpu |= tensor.is_cuda
                if key not in self._copies:
                    self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                tensors[kind] = self._copies[key].copy_(tensor, non_blocking=True)
            copied.append(Fragment(fragment.name, fragment.start, tensors))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied

    def _save(
        self,
        step: int,
        fragments: list[Fragment],
        shapes: dict[str, tuple[int, ...]],
        model: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        world, started = self._world, time.perf_counter()
        directory = checkpoint.temporary_path(self._run_dir, step, self._life)
        key = f"save/{step}"
        try:
            directory.mkdir(parents=True, exist_ok=True)  # by every rank: on a network disk others see it late
            listing = checkpoint.write_rank(directory, world.rank, world.size, fragments)
            world.store.set(f"{key}/{world.rank}", json.dumps(listing))
            world.store.add(f"{key}/written", 1)
            if world.is_first:
                listings = self._meet(key)
                if self._lease is not None:
                    self._lease.check()
                path = checkpoint.commit(directory, listings, shapes, model, state)
                size, seconds = sum(entry["bytes"] for entry in listings), time.perf_counter() - started
                log(f"saved {path}: {size / 1e6:,.0f} MB in {seconds:.2f} s beside training")
                checkpoint.retain(self._run_dir, self._config.keep_last, self._config.keep_every)
        except Exception as error:
            self._fail(step, error)

    def _fail(self, step: int, error: Exception) -> None:
        """Rank 0 must not wait for this rank's part. The directory stays: other ranks may still be writing there."""
        self.failure = error
        self._world.store.set(f"save/{step}/failed", f"rank {self._world.rank}: {one_line(error)}")

    def _meet(self, key: str) -> list[dict[str, Any]]:
        """The listings of all ranks, when all have written. Raises RuntimeError when one of them failed."""
        store = self._world.store
        while store.add(f"{key}/written", 0) < self._world.size:
            if store.check([f"{key}/failed"]):
                raise RuntimeError(f"a checkpoint could not be written: {store.get(f'{key}/failed').decode()}")
            time.sleep(POLL_SECONDS)
        keys = [f"{key}/{rank}" for rank in range(self._world.size)]
        listings = [json.loads(store.get(name)) for name in keys]
        for name in keys:
            store.delete_key(name)
        return listings
