import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli import InputError
from pretrain import order as order_module
from pretrain.order import Order, micro_batches, rank_rows

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "SEQUENCES_PER_BLOCK", 5)


@given(shard_sizes, st.integers(1, 9), st.integers(1, 3), st.integers(-5, 2**63))
def test_an_epoch_meets_every_sequence_at_most_once_and_leaves_out_fewer_than_the_streams(
    sizes: list[int], streams: int, window: int, seed: int
) -> None:
    order = Order(np.array(sizes), streams, window, seed)
    for epoch in range(2):
        places = [order.place(epoch * order.epoch_length + p) for p in range(order.epoch_length)]
        assert max(Counter(places).values()) == 1
        assert sum(sizes) - len(places) < order.streams
        assert all(0 <= place.sequence < sizes[place.row] for place in places)


@given(shard_sizes, st.integers(1, 9), st.integers(0, 2**70))
def test_a_position_means_the_same_whatever_was_asked_before(sizes: list[int], streams: int, start: int) -> None:
    walked = Order(np.array(sizes), streams, 2, 0)
    through = [walked.place(start + step) for step in range(50)]
    assert [Order(np.array(sizes), streams, 2, 0).place(start + step) for step in (49, 0, 20)] == [
        through[49],
        through[0],
        through[20],
    ]


def test_epochs_and_seeds_differ_and_neighbours_are_spread() -> None:
    sizes = np.full(20, 50)
    order = Order(sizes, 4, 2, 0)
    first = [order.place(p) for p in range(order.epoch_length)]
    second = [order.place(order.epoch_length + p) for p in range(order.epoch_length)]
    other = [Order(sizes, 4, 2, 1).place(p) for p in range(order.epoch_length)]
    assert sorted(first) == sorted(second) == sorted(other)  # 1000 divides by 4: nothing is left out
    assert first != second and first != other
    in_genome_order = sum(b == (a.row, a.sequence + 1) for a, b in itertools.pairwise(first))
    assert in_genome_order < 0.05 * len(first)


@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 20))
def test_ranks_share_a_batch_without_gap_or_overlap(batch: int, ranks: int, micro: int) -> None:
    rows = [list(rank_rows(batch, rank, ranks)) for rank in range(ranks)]
    assert list(itertools.chain.from_iterable(rows)) == list(range(batch))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert micro_batches(batch, ranks, micro) == -(-max(map(len, rows)) // micro)


def test_a_split_without_sequences_is_refused() -> None:
    with pytest.raises(InputError, match="no sequence"):
        Order(np.array([0, 0]), 4, 1, 0)
