import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.cli import InputError
from pretrain.config import Config, load_config
from pretrain.loader import Loader, MaskedBatch, open_dataset
from pretrain.masking import CLS, MASK, SEP


def loader(arguments: list[str], rank: int = 0, ranks: int = 1, *overrides: str) -> Loader:
    return Loader(*open_dataset(load_config(arguments[0], [*arguments[1:], *overrides])), rank, ranks)


def sequences(batches: list[MaskedBatch]) -> list[tuple[bytes, ...]]:
    """Each sequence with everything that belongs to it, to compare across layouts."""
    found = []
    for batch in batches:
        starts = batch.packed.cu_seqlens.tolist()
        assert batch.packed.dropout_keys_t is not None
        for start, end in itertools.pairwise(starts):
            inside = (batch.index_m >= start) & (batch.index_m < end)
            parts = (
                batch.packed.ids_t[start:end],
                batch.packed.dropout_keys_t[start:end],
                batch.index_m[inside] - start,
                batch.labels_m[inside],
            )
            found.append(tuple(part.numpy().tobytes() for part in parts))
    return found


@pytest.mark.parametrize(("ranks", "micro"), [(1, 3), (2, 4), (3, 1), (5, 2), (9, 64)])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batch(tiny_config: list[str], ranks: int, micro: int) -> None:
    alone = sequences(loader(tiny_config).step(22))
    overrides = f"train.micro_batch_size={micro}"
    each = [loader(tiny_config, rank, ranks, overrides).step(22) for rank in range(ranks)]
    assert list(itertools.chain.from_iterable(sequences(batches) for batches in each)) == alone
    assert len({len(batches) for batches in each}) == 1  # collectives: as many micro batches on every rank


def test_a_batch_holds_the_stored_sequences_between_cls_and_sep(tiny_config: list[str]) -> None:
    ours = loader(tiny_config)
    split = ours.dataset.split("train")
    batch = ours.step(0)[0]
    starts = batch.packed.cu_seqlens.tolist()
    for number in range(3):
        place = ours.order.place(number)
        rows = split.blocks(place.row)["sequences"]
        block = int(np.searchsorted(np.cumsum(rows), place.sequence, side="right"))
        stored = split.read_block(place.row, block).sequence(place.sequence - int(rows[:block].sum()))
        ids = batch.packed.ids_t[starts[number] : starts[number + 1]].clone()
        assert (ids[0], ids[-1]) == (CLS, SEP)
        assert (ids == MASK).any()
        inside = (batch.index_m >= starts[number]) & (batch.index_m < starts[number + 1])
        ids[batch.index_m[inside] - starts[number]] = batch.labels_m[inside]
        assert ids[1:-1].tolist() == stored.tolist()


@pytest.mark.parametrize("batch", [2, 3, 8, 11])
def test_blocks_in_use_stay_in_memory(tiny_config: list[str], batch: int) -> None:
    ours = loader(tiny_config, 0, 1, f"train.global_batch_size={batch}")
    for position in range(0, ours.order.epoch_length - batch, batch):
        ours.step(position)
    shards = ours.dataset.split("train").shards
    # A stream that begins inside a block reads it again: at most one block a stream more than there are.
    assert ours._train._block.cache_info().misses <= shards["blocks"].sum() + ours.order.streams


def test_validation_is_the_same_on_any_ranks_and_draws_no_dropout(tiny_config: list[str]) -> None:
    def labels(ranks: int) -> list[int]:
        each = [list(loader(tiny_config, rank, ranks).validation()) for rank in range(ranks)]
        assert len({len(batches) for batches in each}) == 1
        assert all(batch.packed.dropout_keys_t is None for batches in each for batch in batches)
        return [int(label) for batches in each for batch in batches for label in batch.labels_m]

    assert labels(1) == labels(3)
    assert labels(1) == [int(label) for batch in loader(tiny_config).validation() for label in batch.labels_m]


def test_a_rank_without_rows_gets_an_empty_micro_batch(tiny_config: list[str]) -> None:
    (batch,) = loader(tiny_config, 0, 4, "train.global_batch_size=3").step(0)
    assert batch.packed.ids_t.shape == (0,) and batch.packed.cu_seqlens.tolist() == [0]
    assert batch.index_m.dtype == torch.int64


def test_state_of_another_dataset_or_seed_is_refused(tiny_config: list[str]) -> None:
    ours = loader(tiny_config)
    state = ours.state(110)
    assert set(state) == {"manifest_sha256", "seed", "position"}
    ours.check_state(state)
    with pytest.raises(InputError, match="seed 7"):
        ours.check_state(state | {"seed": 7})
    with pytest.raises(InputError, match="manifest_sha256 abc"):
        ours.check_state(state | {"manifest_sha256": "abc"})


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_config: list[str], tmp_path: Path) -> None:
    def config(*overrides: str) -> Config:
        return load_config(tiny_config[0], [*tiny_config[1:], *overrides])

    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(InputError, match=r"another tokenizer.*other\.json"):
        open_dataset(config(f"data.tokenizer={other}"))
    with pytest.raises(InputError, match=r"model\.vocab_size=512"):
        open_dataset(config("model.vocab_size=4096"))
    assert open_dataset(config())[0].model.vocab_size == 512  # the dataset's, where none is given
    with pytest.raises(InputError, match=r"manifest\.json: not found"):
        open_dataset(config(f"data.path={tmp_path}"))
