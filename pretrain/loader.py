"""From positions to micro batches: reads sequences by index, adds [CLS] and [SEP], masks, packs without padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.cli import InputError
from data_prep.dataset import Dataset, Split, file_sha256
from kernels.attention import MAX_SEQUENCE
from kernels.random import PURPOSE_DROPOUT, fork, root_key
from pretrain.config import Config
from pretrain.masking import CLS, SEP, Masking
from pretrain.model import Packed
from pretrain.order import Order, Place, micro_batches, rank_rows

VALIDATION_SEED = 0  # of masks: every run and every rank validates on the same tokens


@dataclass(frozen=True)
class MaskedBatch:
    """One micro batch with its task. Empty when this rank has fewer rows than another."""

    packed: Packed
    index_m: Tensor  # int64 [m], which of the packed tokens are predicted
    labels_m: Tensor  # int64 [m]

    def to(self, device: torch.device) -> MaskedBatch:
        return MaskedBatch(
            self.packed.to(device),
            self.index_m.to(device, non_blocking=True),
            self.labels_m.to(device, non_blocking=True),
        )


class SplitReader:
    """Sequences of a split by (shard row, sequence of the shard), with the blocks in use kept."""

    def __init__(self, split: Split, cached_blocks: int) -> None:
        self.split = split
        self._bounds = lru_cache(maxsize=4096)(self._block_bounds)
        self._block = lru_cache(maxsize=cached_blocks)(split.read_block)

    def _block_bounds(self, row: int) -> NDArray[np.int64]:
        return np.cumsum(self.split.blocks(row)["sequences"], dtype=np.int64)

    def read(self, place: Place) -> NDArray[np.int64]:
        """Content tokens of one sequence, int64."""
        ends = self._bounds(place.row)
        block = int(np.searchsorted(ends, place.sequence, side="right"))
        first = int(ends[block - 1]) if block else 0
        return self._block(place.row, block).sequence(place.sequence - first).astype(np.int64)


def pack(reader: SplitReader, rows: Sequence[tuple[int, Place]], masking: Masking, dropout_key: int | None) -> MaskedBatch:
    """Read, mask and lay end to end the sequences `rows`, pairs of (position, place).

    `dropout_key` None: no dropout keys (evaluation). Token t of the sequence at position p has dropout key
    fork(fork(dropout_key, p), t).
    """
    ids: list[NDArray[np.int64]] = []
    index: list[NDArray[np.int64]] = []
    labels: list[NDArray[np.int64]] = []
    keys: list[NDArray[np.int64]] = []
    starts = [0]
    for position, place in rows:
        tokens = reader.read(place)
        seen, masked = masking.apply(tokens, position)
        ids += [np.array([CLS]), seen, np.array([SEP])]
        index.append(masked + starts[-1] + 1)
        labels.append(tokens[masked])
        if dropout_key is not None:
            keys.append(fork(fork(np.array([dropout_key]), position), np.arange(len(tokens) + 2)))
        starts.append(starts[-1] + len(tokens) + 2)
    packed = Packed(
        ids_t=_join(ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=int(np.diff(starts).max(initial=0)),
        dropout_keys_t=None if dropout_key is None else _join(keys),
    )
    return MaskedBatch(packed, _join(index), _join(labels))


def _join(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)


class Loader:
    """The batches of one rank. Its whole state is {manifest sha256, seed, position}; the position is step * batch size."""

    def __init__(self, config: Config, dataset: Dataset, rank: int, ranks: int) -> None:
        self.dataset = dataset
        order = self.dataset.manifest["order"]
        train, valid = self.dataset.split("train"), self.dataset.split("valid")
        self.order = Order(train.shards["sequences"], order["streams"], order["window_blocks"], config.train.seed)
        self.config, self.rank, self.ranks = config, rank, ranks
        # A row of the batch meets S / gcd(S, B) streams in turn, and an open window touches one block more than it holds.
        size = config.train.global_batch_size
        rows, turns = len(rank_rows(size, rank, ranks)), self.order.streams // math.gcd(self.order.streams, size)
        open_streams = min(self.order.streams, rows * turns)
        self._train = SplitReader(train, cached_blocks=max(1, open_streams) * (order["window_blocks"] + 1))
        self._valid = SplitReader(valid, cached_blocks=2)
        self._valid_ends = np.cumsum(valid.shards["sequences"], dtype=np.int64)
        vocab_size, seed = config.model.vocab_size, config.train.seed
        self._masking = Masking(config.data, vocab_size, seed)
        self._valid_masking = Masking(config.data, vocab_size, VALIDATION_SEED)
        self._dropout_key = root_key(seed, PURPOSE_DROPOUT)

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps of the loader."""
        return {"manifest_sha256": self.dataset.sha256, "seed": self.config.train.seed, "position": position}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise InputError when `state` was saved with another dataset, seed or place in the order."""
        for key, value in self.state(state["position"]).items():
            if state[key] != value:
                raise InputError(
                    f"{self.dataset.path}: the checkpoint was trained with {key} {state[key]}, this run has {value}; "
                    "resume with the same dataset and seed, or use another run_dir"
                )

    def step(self, position: int) -> list[MaskedBatch]:
        """This rank's micro batches of the global batch that begins at `position`; as many as any other rank has."""
        size, micro = self.config.train.global_batch_size, self.config.train.micro_batch_size
        positions = [position + row for row in rank_rows(size, self.rank, self.ranks)]
        rows = [(p, self.order.place(p)) for p in positions]
        return [
            pack(self._train, rows[i * micro : (i + 1) * micro], self._masking, self._dropout_key)
            for i in range(micro_batches(size, self.ranks, micro))
        ]

    def validation(self) -> Iterator[MaskedBatch]:
        """This rank's share of the validation sequences: spread evenly over the split, masked the same way every time."""
        total = int(self._valid_ends[-1]) if len(self._valid_ends) else 0
        count, micro = min(self.config.validation.sequences, total), self.config.train.micro_batch_size
        mine = rank_rows(count, self.rank, self.ranks)
        for i in range(micro_batches(count, self.ranks, micro)):
            rows = [(n, self._valid_place(n * total // count)) for n in mine[i * micro : (i + 1) * micro]]
            yield pack(self._valid, rows, self._valid_masking, dropout_key=None)

    def _valid_place(self, number: int) -> Place:
        row = int(np.searchsorted(self._valid_ends, number, side="right"))
        return Place(row, number - (int(self._valid_ends[row - 1]) if row else 0))


def open_dataset(config: Config) -> tuple[Config, Dataset]:
    """Open the dataset, check that it fits, and return it with the configuration resolved by it.

    `model.vocab_size` is the dataset's where the configuration doesn't give one. Raises InputError naming the file or key.
    """
    dataset = Dataset(config.data.path)
    tokenizer = dataset.manifest["tokenizer"]
    if config.data.tokenizer is not None:
        wanted = file_sha256(Path(config.data.tokenizer))
        if wanted != tokenizer["sha256"]:
            raise InputError(
                f"{dataset.path}: was made with another tokenizer (sha256 {tokenizer['sha256'][:12]}...) than "
                f"data.tokenizer {config.data.tokenizer} ({wanted[:12]}...); shard again or change the key"
            )
    if dataset.manifest["sequence_length"] > MAX_SEQUENCE:
        raise InputError(
            f"{dataset.path}: sequence_length {dataset.manifest['sequence_length']} is over the {MAX_SEQUENCE} tokens "
            "that attention takes; shard with a shorter one"
        )
    size = tokenizer["vocab_size"]
    if "vocab_size" not in config.model.model_fields_set:
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    if size != config.model.vocab_size:
        raise InputError(
            f"{dataset.path}: its tokenizer has {size} tokens, model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size={size} or shard with another tokenizer"
        )
    return config, dataset
