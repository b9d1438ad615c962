"""From positions to micro batches: reads sequences by index, adds [CLS] and [SEP], masks, packs without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.cache import Cache, default_directory
from data_prep.cli import InputError, log
from data_prep.dataset import SPLITS, Dataset
from data_prep.storage import file_sha256
from kernels import MAX_SEQUENCE
from kernels.random import PURPOSE_DROPOUT, fork, root_key
from pretrain.blocks import BlockPool, slot_bytes, slots_needed
from pretrain.config import Config
from pretrain.masking import CLS, SEP, Masking, span_tokens
from pretrain.model import Packed
from pretrain.order import Order, micro_batches, rank_rows, streams_in_use
from pretrain.sampling import draws
from pretrain.schedule import batch_size

VALIDATION_SEED = 0  # of masks: every run and every rank validates on the same tokens
PLACES_AT_ONCE = 16384  # positions that are turned into places together: the arithmetic is cheap in bulk
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class MaskedBatch:
    """One micro batch with its task. Empty when this rank has fewer rows than another."""

    packed: Packed
    index_m: Tensor  # int64 [m], which of the packed tokens are predicted
    labels_m: Tensor  # int64 [m]
    positions_b: Ints  # [b], of its sequences in the order of training
    skipped: int = 0  # sequences that are missing here because their block is damaged

    def to(self, device: torch.device) -> MaskedBatch:
        return MaskedBatch(
            self.packed.to(device),
            self.index_m.to(device, non_blocking=True),
            self.labels_m.to(device, non_blocking=True),
            self.positions_b,
            self.skipped,
        )

    def pin(self) -> MaskedBatch:
        """In memory from which a GPU copies while the CPU goes on."""
        return MaskedBatch(
            self.packed.pin(), self.index_m.pin_memory(), self.labels_m.pin_memory(), self.positions_b, self.skipped
        )


def pack(
    tokens_bt: NDArray[np.uint16],
    lengths_b: Ints,
    positions_b: Ints,
    masking: Masking | None,
    dropout_key: int | None,
) -> MaskedBatch:
    """Mask sequences and lay them end to end.

    Args:
        tokens_bt: uint16 [sequences, width], content tokens; what lies beyond a sequence's length doesn't matter.
        lengths_b: int64 [sequences]; one of length 0 is left out and counted as skipped.
        positions_b: int64 [sequences], of each in the order of training.
        masking: None: nothing is masked.
        dropout_key: token t, [CLS] being 0, of the sequence at position p gets fork(fork(dropout_key, p), t); None: no keys.
    """
    skipped = int(np.count_nonzero(lengths_b == 0))
    if skipped:
        whole = lengths_b > 0
        tokens_bt, lengths_b, positions_b = tokens_bt[whole], lengths_b[whole], positions_b[whole]
    ends_b = np.cumsum(lengths_b + 2)
    width = int(lengths_b.max(initial=0)) + 2
    columns = np.arange(width)
    ids_bt = np.empty((len(lengths_b), width), np.int64)
    ids_bt[:, 0] = CLS
    ids_bt[:, 1:-1] = tokens_bt[:, : width - 2]
    ids_bt[np.arange(len(lengths_b)), lengths_b + 1] = SEP
    # Where all sequences are as long as the longest, which is the usual case, there is nothing to cut away.
    inside = slice(None) if len(lengths_b) * width == ends_b[-1:].sum() else columns < lengths_b[:, None] + 2

    def flat(x_bt: NDArray[Any]) -> NDArray[Any]:
        return x_bt[inside].reshape(-1)

    index, labels, keys = np.zeros(0, np.int64), np.zeros(0, np.int64), None
    if masking is not None:
        chosen_bt, labels = masking.apply(ids_bt, lengths_b, positions_b)
        index = np.flatnonzero(flat(chosen_bt))
    if dropout_key is not None:
        keys = torch.from_numpy(flat(fork(fork(np.array([dropout_key]), positions_b)[:, None], columns)))
    packed = Packed(
        ids_t=torch.from_numpy(flat(ids_bt)),
        cu_seqlens=torch.from_numpy(np.append(0, ends_b).astype(np.int32)),
        max_seqlen=width if len(lengths_b) else 0,
        dropout_keys_t=keys,
    )
    return MaskedBatch(packed, torch.from_numpy(index), torch.from_numpy(labels), positions_b, skipped)


class Loader:
    """The batches of one rank. Its whole state is {manifest sha256, seed, fingerprint of the order, position}.

    Args:
        pin: batches in pinned memory, for a GPU.
        plain: tokens only, without masks and dropout keys, to measure what those cost.

    Training batches and validation batches may be asked for by two threads, each by one.
    """

    def __init__(
        self, config: Config, dataset: Dataset, rank: int, ranks: int, *, pin: bool = False, plain: bool = False
    ) -> None:
        self.dataset, self.config, self.rank, self.ranks, self.pin = dataset, config, rank, ranks, pin
        train, valid, width = dataset.split("train"), dataset.split("valid"), dataset.manifest["sequence_length"] - 2
        self.order = build_order(config, dataset, report=rank == 0)
        size, window = config.train.global_batch_size, dataset.manifest["order"]["window_blocks"]
        open_streams = self.order.streams  # smaller batches wander over all of them
        if config.train.batch_warmup is None:
            open_streams = min(open_streams, -(-len(rank_rows(size, rank, ranks)) * open_streams // size))
        needed = min(int(train.shards["blocks"].sum()), slots_needed(open_streams, window))
        bound = int(config.data.memory_gb * 1e9 / slot_bytes(width))
        if bound < needed and rank == 0:
            log(
                f"data.memory_gb {config.data.memory_gb} holds {bound} blocks of the {needed} that a rank has open at once: "
                "blocks will be read several times; give more memory or use more ranks"
            )
        skip, threads = config.data.on_damaged_block == "skip", config.data.read_threads
        self.train_pool = BlockPool(train, width, max(1, min(needed, bound)), threads, skip)
        self.valid_pool = BlockPool(valid, width, 8, 1, skip)
        self._valid_ends = np.cumsum(valid.shards["sequences"], dtype=np.int64)
        vocab_size, seed = config.model.vocab_size, config.train.seed
        span = span_tokens(dataset.manifest["tokenizer"])
        self._masking = None if plain else Masking(config.data, vocab_size, seed, span)
        self._valid_masking = Masking(config.data, vocab_size, VALIDATION_SEED, span)
        self._dropout_key = None if plain else root_key(seed, PURPOSE_DROPOUT)

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps of the loader."""
        return {
            "manifest_sha256": self.dataset.sha256,
            "seed": self.config.train.seed,
            "order": self.order.fingerprint(),
            "position": position,
        }

    def resume(self, state: dict[str, Any]) -> int:
        """The position to go on from.

        After training on another dataset, with another seed or in another order (sampling) that is, with
        `data.start_new_epoch`, the first epoch that begins at or after the old position, so that no mask or dropout key
        comes twice; without it, raises InputError.
        """
        position = int(state["position"])
        now = self.state(position)
        changed = [key for key in now if state.get(key) != now[key]]
        if not changed:
            return position
        text = ", ".join(f"{key} {state.get(key)}, this run has {now[key]}" for key in changed)
        if not self.config.data.start_new_epoch:
            raise InputError(
                f"{self.dataset.path}: the checkpoint was trained with {text}; resume with the same ones, use another "
                "run_dir, or set data.start_new_epoch=true to go on with the first epoch of what is here now"
            )
        epoch = -(-position // self.order.epoch_length)
        if self.rank == 0:
            log(f"{self.dataset.path}: the checkpoint was trained with {text}; going on with the beginning of epoch {epoch}")
        return epoch * self.order.epoch_length

    def steps(self, position: int, step: int = 0) -> Iterator[list[MaskedBatch]]:
        """This rank's micro batches of one global batch after another, without end.

        The first is that of `step`, counted from 0, and begins at `position`; steps have as many sequences as
        `pretrain.schedule.batch_size` says.
        """
        train = self.config.train
        at_once = max(1, PLACES_AT_ONCE * self.ranks // train.global_batch_size)
        while True:
            sizes = [batch_size(train, step + number) for number in range(at_once)]
            positions = []
            for size in sizes:
                positions.append(position + self._rows(size))
                position += size
            rows, sequences = self.order.places(np.concatenate(positions))
            end = 0
            for size, here in zip(sizes, positions, strict=True):
                start, end = end, end + len(here)
                yield self._batches(rows[start:end], sequences[start:end], here, size)
            step += at_once

    def step(self, position: int) -> list[MaskedBatch]:
        """This rank's micro batches of the full global batch that begins at `position`; as many as any other rank has."""
        size = self.config.train.global_batch_size
        positions = position + self._rows(size)
        return self._batches(*self.order.places(positions), positions, size)

    def _rows(self, size: int) -> Ints:
        return np.array(rank_rows(size, self.rank, self.ranks), np.int64)

    def _batches(self, rows: Ints, sequences: Ints, positions: Ints, size: int) -> list[MaskedBatch]:
        tokens_bt, lengths_b = self.train_pool.read(rows, sequences)
        micro = self.config.train.micro_batch_size
        count = micro_batches(size, self.ranks, micro)
        parts = [slice(i * micro, (i + 1) * micro) for i in range(count)]
        batches = [
            pack(tokens_bt[part], lengths_b[part], positions[part], self._masking, self._dropout_key) for part in parts
        ]
        return [batch.pin() for batch in batches] if self.pin else batches

    def validation(self) -> Iterator[tuple[str, MaskedBatch]]:
        """This rank's share of the validation sequences: spread evenly over the split, masked the same way every time.

        Each batch holds sequences of one species category, which stands with it. All ranks yield as many batches of each
        category, in the same order.
        """
        shards, micro = self.valid_pool.split.shards, self.config.train.micro_batch_size
        total = int(self._valid_ends[-1]) if len(self._valid_ends) else 0
        count = min(self.config.validation.sequences, total)
        numbers = np.arange(count, dtype=np.int64) * total // max(count, 1)
        rows = np.searchsorted(self._valid_ends, numbers, side="right")
        sequences = numbers - (self._valid_ends - shards["sequences"].astype(np.int64))[rows]
        categories = np.array([species["category"] for species in self.dataset.manifest["species"]])[shards["species"][rows]]
        for category in np.unique(categories):
            alike = np.flatnonzero(categories == category)
            mine = alike[rank_rows(len(alike), self.rank, self.ranks)]
            for i in range(micro_batches(len(alike), self.ranks, micro)):
                part = mine[i * micro : (i + 1) * micro]
                read = self.valid_pool.read(rows[part], sequences[part])
                batch = pack(*read, numbers[part], self._valid_masking, dropout_key=None)
                yield str(category), batch.pin() if self.pin else batch


def build_order(config: Config, dataset: Dataset, report: bool = False) -> Order:
    """The order in which a run goes through a dataset. `report`: log what sampling weights come to."""
    shards, settings = dataset.split("train").shards, dataset.manifest["order"]
    counts = draws(config.data.sampling, dataset.manifest["species"], shards, str(dataset.path), report)
    sequences, size = np.ascontiguousarray(shards["sequences"], np.int64), config.train.global_batch_size
    return Order(
        sequences,
        streams_in_use(settings["streams"], size, int(sequences.sum())),
        settings["window_blocks"],
        config.train.seed,
        species=shards["species"],
        batch_size=size,
        draws=counts,
    )


def open_dataset(config: Config) -> tuple[Config, Dataset]:
    """Open the dataset, check that it fits, and return it with the configuration resolved by it.

    `model.vocab_size` is the dataset's where the configuration doesn't give one. Raises InputError naming the file or key.
    """
    directory = Path(config.data.cache_dir) if config.data.cache_dir else default_directory()
    dataset = Dataset(config.data.path, Cache(directory, int(config.data.cache_gb * 1e9)))
    tokenizer = dataset.manifest["tokenizer"]
    if config.data.tokenizer is not None:
        wanted = file_sha256(Path(config.data.tokenizer))
        if wanted != tokenizer["sha256"]:
            raise InputError(
                f"{dataset.path}: was made with another tokenizer (sha256 {tokenizer['sha256'][:12]}...) than "
                f"data.tokenizer {config.data.tokenizer} ({wanted[:12]}...); shard again or change the key"
            )
    for split in SPLITS:
        dataset.split(split)  # its table, which a URL may fail to give, while no rank waits for another yet
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
