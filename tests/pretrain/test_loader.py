import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.cli import InputError
from pretrain.config import Config, DataConfig, load_config
from pretrain.loader import Loader, MaskedBatch, open_dataset, pack
from pretrain.masking import CLS, MASK, SEP, Masking
from pretrain.order import micro_batches


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


@pytest.mark.parametrize(("ranks", "micro"), [(1, 3), (2, 4), (3, 1), (4, 3), (5, 2), (6, 2), (7, 5), (8, 1), (9, 64)])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batch(tiny_config: list[str], ranks: int, micro: int) -> None:
    each = [loader(tiny_config, rank, ranks, f"train.micro_batch_size={micro}") for rank in range(ranks)]
    alone = loader(tiny_config)
    for position in (22, alone.order.epoch_length - 5):  # the second: across the end of the epoch
        parts = [ours.step(position) for ours in each]
        assert list(itertools.chain.from_iterable(map(sequences, parts))) == sequences(alone.step(position))
        assert len({len(batches) for batches in parts}) == 1  # collectives: as many micro batches on every rank


def test_a_batch_holds_the_stored_sequences_between_cls_and_sep(tiny_config: list[str]) -> None:
    ours = loader(tiny_config)
    split = ours.dataset.split("train")
    batch = ours.step(0)[0]
    starts = batch.packed.cu_seqlens.tolist()
    assert batch.positions_b.tolist() == [0, 1, 2] and (batch.packed.ids_t == MASK).any()
    for number, (row, sequence) in enumerate(zip(*ours.order.places(batch.positions_b), strict=True)):
        stored = split.read_block(row, sequence // 1024).sequence(sequence % 1024)
        ids = batch.packed.ids_t[starts[number] : starts[number + 1]].clone()
        assert (ids[0], ids[-1]) == (CLS, SEP)
        inside = (batch.index_m >= starts[number]) & (batch.index_m < starts[number + 1])
        ids[batch.index_m[inside] - starts[number]] = batch.labels_m[inside]
        assert ids[1:-1].tolist() == stored.tolist()


def test_steps_are_the_same_from_every_start(tiny_config: list[str]) -> None:
    """Starting at step k equals running to step k, through the end of an epoch."""
    overrides = ("train.global_batch_size=67", "train.micro_batch_size=30")
    ours = loader(tiny_config, 1, 2, *overrides)
    steps = 2 * ours.order.epoch_length // 67
    assert steps > 10
    walked = [sequences(batches) for batches in itertools.islice(ours.steps(0), steps)]
    for start in range(steps):
        assert sequences(next(loader(tiny_config, 1, 2, *overrides).steps(start * 67))) == walked[start]
        assert sequences(ours.step(start * 67)) == walked[start]


def test_short_sequences_are_packed_without_padding() -> None:
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(5, 512, (5, 20)).astype(np.uint16), np.array([3, 20, 1, 0, 7])
    masking = Masking(DataConfig(path="", mask_probability=0.5), 512, 0)
    batch = pack(tokens, lengths, np.arange(5) + 70, masking, dropout_key=9)
    starts = batch.packed.cu_seqlens.tolist()
    assert starts == [0, 5, 27, 30, 39] and batch.packed.max_seqlen == 22
    assert (batch.skipped, batch.positions_b.tolist()) == (1, [70, 71, 72, 74])
    alone = [pack(tokens[i : i + 1], lengths[i : i + 1], np.array([70 + i]), masking, dropout_key=9) for i in (0, 1, 2, 4)]
    assert sequences([batch]) == sequences(alone)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 11), (2, 8), (3, 24), (5, 55), (2, 3)])
def test_all_ranks_together_read_each_block_once_an_epoch_but_where_streams_begin(
    tiny_config: list[str], ranks: int, batch: int
) -> None:
    each = [loader(tiny_config, rank, ranks, f"train.global_batch_size={batch}") for rank in range(ranks)]
    for ours in each:
        for _ in zip(range(ours.order.epoch_length // batch), ours.steps(0), strict=False):
            pass
    read = sum(ours.train_pool.blocks_read for ours in each)
    blocks = each[0].dataset.split("train").shards["blocks"].sum()
    assert blocks <= read <= blocks + each[0].order.streams


def test_too_little_memory_costs_reads_and_changes_nothing(
    tiny_config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = loader(tiny_config, 0, 1, "data.memory_gb=0.0005")
    assert "data.memory_gb 0.0005 holds 1 blocks of the" in capsys.readouterr().err
    assert sequences(small.step(22)) == sequences(loader(tiny_config).step(22))


def test_a_plain_loader_has_neither_masks_nor_keys(tiny_config: list[str]) -> None:
    plain = Loader(*open_dataset(load_config(tiny_config[0], tiny_config[1:])), 0, 1, plain=True).step(0)[0]
    assert plain.packed.dropout_keys_t is None and len(plain.labels_m) == len(plain.index_m) == 0
    assert not (plain.packed.ids_t == MASK).any()


def test_validation_is_the_same_on_any_ranks_category_by_category(tiny_config: list[str]) -> None:
    def validation(ranks: int, *overrides: str) -> dict[str, list[int]]:
        """Positions and labels by category, of all ranks."""
        each = [list(loader(tiny_config, rank, ranks, *overrides).validation()) for rank in range(ranks)]
        # Collectives: the same categories in the same order on every rank, empty batches included.
        assert len({tuple(category for category, _ in batches) for batches in each}) == 1
        assert all(batch.packed.dropout_keys_t is None for batches in each for _, batch in batches)
        found: dict[str, list[int]] = {category: [] for category, _ in each[0]}
        for category, batch in itertools.chain.from_iterable(each):
            found[category] += [*batch.positions_b.tolist(), *batch.labels_m.tolist()]
        return {category: sorted(values) for category, values in found.items()}

    alone = validation(1)
    assert len(alone) == 3 and all(alone.values())
    for ranks in (1, 3, 7):  # with 7, most have no sequence of some category
        assert validation(ranks) == validation(ranks, "train.seed=5") == alone


def test_a_validation_batch_holds_every_so_many_th_sequence_of_its_category(tiny_config: list[str]) -> None:
    ours = loader(tiny_config, 0, 1, "validation.sequences=10")
    shards, species = ours.dataset.split("valid").shards, ours.dataset.manifest["species"]
    of_sequence = [
        (row, sequence) for row, shard in enumerate(shards) for sequence in range(shard["sequences"])
    ]  # of the split, in its order
    batches = list(ours.validation())
    numbers = [number for _, batch in batches for number in batch.positions_b.tolist()]
    assert sorted(numbers) == [i * len(of_sequence) // 10 for i in range(10)]
    for category, batch in batches:
        starts = batch.packed.cu_seqlens.tolist()
        ids = batch.packed.ids_t.clone()
        ids[batch.index_m] = batch.labels_m
        for start, end, number in zip(starts[:-1], starts[1:], batch.positions_b.tolist(), strict=True):
            row, sequence = of_sequence[number]
            assert species[shards["species"][row]]["category"] == category
            stored = ours.dataset.split("valid").read_block(row, sequence // 1024).sequence(sequence % 1024)
            assert ids[start + 1 : end - 1].tolist() == stored.tolist()


def test_a_rank_without_rows_gets_an_empty_micro_batch(tiny_config: list[str]) -> None:
    (batch,) = loader(tiny_config, 0, 4, "train.global_batch_size=3").step(0)
    assert batch.packed.ids_t.shape == (0,) and batch.packed.cu_seqlens.tolist() == [0]
    assert batch.index_m.dtype == torch.int64


def test_state_of_another_dataset_or_seed_is_refused_unless_a_new_epoch_is_wanted(tiny_config: list[str]) -> None:
    ours, length = loader(tiny_config), loader(tiny_config).order.epoch_length
    state = ours.state(length + 110)
    assert set(state) == {"manifest_sha256", "seed", "order", "position"}
    assert ours.resume(state) == length + 110
    with pytest.raises(InputError, match=r"seed 7, this run has 0.*data\.start_new_epoch=true"):
        ours.resume(state | {"seed": 7})
    with pytest.raises(InputError, match="manifest_sha256 abc"):
        ours.resume(state | {"manifest_sha256": "abc"})
    with pytest.raises(InputError, match="order "):  # as it was saved with other shares of the species
        loader(tiny_config, 0, 1, "data.sampling.temperature=2").resume(state)
    with pytest.raises(InputError, match="order None"):
        ours.resume({key: value for key, value in state.items() if key != "order"})
    again = loader(tiny_config, 0, 1, "data.start_new_epoch=true")
    assert again.resume(state) == length + 110  # the same data: nothing to begin anew, however often the run is resumed
    assert again.resume(state | {"seed": 7}) == 2 * length
    assert again.resume(state | {"manifest_sha256": "abc"}) == 2 * length


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


@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_that_grow_follow_one_another(tiny_config: list[str], ranks: int) -> None:
    """The order is that of full batches; any step can be the first, and ranks share what there is."""
    overrides = ("train.batch_warmup.start=2", "train.batch_warmup.steps=4")
    walked = []
    for rank in range(ranks):
        steps = loader(tiny_config, rank, ranks, *overrides).steps(0)
        walked.append([[batch.positions_b.tolist() for batch in next(steps)] for _ in range(6)])
    ends = np.cumsum([2, 4, 6, 8, 11, 11])
    for step, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        here = [position for rank in walked for micro in rank[step] for position in micro]
        assert here == list(range(start, end))
        assert {len(rank[step]) for rank in walked} == {micro_batches(end - start, ranks, 3)}
    later = loader(tiny_config, 0, ranks, *overrides).steps(6, 2)
    assert [[batch.positions_b.tolist() for batch in next(later)] for _ in range(4)] == walked[0][2:]
    full, first = loader(tiny_config).step(0), next(loader(tiny_config, 0, 1, *overrides).steps(0))
    assert sequences(first) == sequences(full)[:2]
