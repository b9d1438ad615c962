import itertools
from collections import Counter
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import InputError
from pretrain import order as order_module
from pretrain.order import Order, micro_batches, permuted, rank_rows, shuffled, streams_in_use

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
BLOCK = 5


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "SEQUENCES_PER_BLOCK", BLOCK)


def places(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    rows, sequences = order.places(np.arange(start, stop))
    return list(zip(rows.tolist(), sequences.tolist(), strict=True))


@given(shard_sizes, st.integers(1, 9), st.integers(1, 3), st.integers(-5, 2**63))
def test_an_epoch_meets_every_sequence_at_most_once_and_leaves_out_fewer_than_the_streams(
    sizes: list[int], streams: int, window: int, seed: int
) -> None:
    order = Order(np.array(sizes), streams, window, seed)
    for epoch in range(2):
        found = places(order, epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
        assert max(Counter(found).values()) == 1
        assert sum(sizes) - len(found) < order.streams
        assert all(0 <= sequence < sizes[row] for row, sequence in found)


@given(shard_sizes, st.integers(1, 9), st.integers(0, 2**62))
def test_a_position_means_the_same_whatever_was_asked_with_it(sizes: list[int], streams: int, start: int) -> None:
    together = places(Order(np.array(sizes), streams, 2, 0), start, start + 50)
    alone = Order(np.array(sizes), streams, 2, 0)
    assert [places(alone, start + step, start + step + 1)[0] for step in (49, 0, 20)] == [
        together[49],
        together[0],
        together[20],
    ]


def test_positions_beyond_2_to_the_32_are_no_others() -> None:
    sizes = np.full(3000, 2_000_000)  # 6e9 sequences
    order = Order(sizes, 4096, 4, 0)
    start = 3 * order.epoch_length + 5_000_000_000
    found = places(order, start, start + 20_000)
    assert len(set(found)) == 20_000
    assert max(sequence for _, sequence in found) < 2_000_000
    assert found[-1] == places(Order(sizes, 4096, 4, 0), start + 19_999, start + 20_000)[0]


def test_epochs_and_seeds_differ_and_neighbours_are_spread() -> None:
    sizes = np.full(20, 50)
    order = Order(sizes, 4, 2, 0)
    first = places(order, 0, 1000)
    second = places(order, 1000, 2000)
    other = places(Order(sizes, 4, 2, 1), 0, 1000)
    assert sorted(first) == sorted(second) == sorted(other)  # 1000 divides by 4: nothing is left out
    assert first != second and first != other
    in_genome_order = sum(b == (row, sequence + 1) for (row, sequence), b in itertools.pairwise(first))
    assert in_genome_order < 0.05 * len(first)


@given(shard_sizes, st.lists(st.integers(0, 30), min_size=12, max_size=12), st.integers(1, 4), st.integers(0, 3))
def test_species_give_what_they_are_asked_for_and_pass_by_pass(
    sizes: list[int], wanted: list[int], species_count: int, seed: int
) -> None:
    species = np.arange(len(sizes)) % species_count
    available = np.bincount(species, weights=sizes, minlength=species_count).astype(int)
    draws = [count if some else 0 for count, some in zip(wanted, available, strict=False)]
    if sum(draws) == 0:
        return
    order = Order(np.array(sizes), 1, 2, seed, species=species, draws=draws)  # one stream: nothing is left out
    length = sum(draws)
    assert order.epoch_length == length
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(5):
        found = places(order, epoch * length, (epoch + 1) * length)
        assert Counter(int(species[row]) for row, _ in found) == Counter({s: n for s, n in enumerate(draws) if n})
        seen.update(found)
        for number, count in enumerate(draws):
            # A pass over a species ends before the next begins: no sequence is ahead of another by more than one.
            times = [seen[row, i] for row, size in enumerate(sizes) if species[row] == number for i in range(size)]
            assert count == 0 or max(times) - min(times) <= 1


@given(st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_permutations_are_permutations(length: int, key: int) -> None:
    keys, lengths = np.full(length, key), np.full(length, length)
    assert sorted(permuted(keys, lengths, np.arange(length))) == list(range(length))
    assert all(sorted(row) == list(range(length)) for row in shuffled(np.array([key, key + 1 - 2**63]), length).tolist())


@pytest.mark.parametrize("length", [16, 100, 4096])
def test_permutations_send_an_element_anywhere_alike(length: int) -> None:
    draws, bins = 100_000, 16
    keys = np.arange(draws) * 0x1234567
    found = permuted(keys, np.full(draws, length), np.full(draws, 3)) * bins // length
    counts, expected = (
        np.bincount(found, minlength=bins),
        np.diff(np.ceil(np.arange(bins + 1) * length / bins)) / length * draws,
    )
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi squared, 15 degrees of freedom: one in 10,000


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 100_000))
def test_rows_of_a_batch_keep_their_streams(streams: int, batch: int, sequences: int) -> None:
    used = streams_in_use(streams, batch, sequences)
    assert used <= max(streams, batch)
    if batch <= streams or sequences >= 8 * batch:
        assert used % batch == 0  # so position p and p + batch meet streams that differ by a multiple of the batch
        assert used > streams // 2
    else:
        assert used == streams


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(20, 60), min_size=3, max_size=12),
    st.integers(2, 12),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_ranks_read_a_block_once_but_where_streams_begin_and_end(
    sizes: list[int], streams: int, batch: int, ranks: int
) -> None:
    streams = streams_in_use(streams, batch, 10**9)
    order = Order(np.array(sizes), streams, 2, 0, species=np.arange(len(sizes)) % 3, batch_size=batch)
    blocks = sum(-(-size // BLOCK) for size in sizes)
    pairs = set()
    for start in range(0, order.epoch_length - batch + 1, batch):
        for rank in range(ranks):
            rows = rank_rows(batch, rank, ranks)
            pairs |= {(rank, row, i // BLOCK) for row, i in places(order, start + rows.start, start + rows.stop)}
    assert len(pairs) <= blocks + order.streams
    assert gcd(order.streams, batch) in (batch, order.streams)


@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 20))
def test_ranks_share_a_batch_without_gap_or_overlap(batch: int, ranks: int, micro: int) -> None:
    rows = [list(rank_rows(batch, rank, ranks)) for rank in range(ranks)]
    assert list(itertools.chain.from_iterable(rows)) == list(range(batch))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert micro_batches(batch, ranks, micro) == -(-max(map(len, rows)) // micro)


def test_what_is_left_out_is_another_part_each_epoch() -> None:
    order = Order(np.array([20]), 7, 2, 0)
    epochs = [set(places(order, epoch * 14, (epoch + 1) * 14)) for epoch in range(30)]
    assert all(len(epoch) == 14 for epoch in epochs)
    assert len(set.union(*epochs)) == 20


@pytest.mark.parametrize(("streams", "batch"), [(32, 32), (64, 16)])
def test_each_batch_has_its_share_of_each_species_and_of_the_whole_axis(streams: int, batch: int) -> None:
    species = np.repeat([0, 1, 2], [40, 20, 20])
    order = Order(np.full(80, 40), streams, 2, 0, species=species, batch_size=batch)
    for start in range(0, order.epoch_length, batch):
        found = places(order, start, start + batch)
        counts = np.bincount([species[row] for row, _ in found], minlength=3)
        # A species is one stretch of the axis, which is cut once: its ends and the cut move it by less than a row each.
        assert np.abs(counts - batch * np.array([0.5, 0.25, 0.25])).max() <= 3
        assert len({row for row, _ in found}) >= batch - 1  # all from different shards, but for the cut


def test_windows_of_streams_do_not_begin_together() -> None:
    order = Order(np.full(64, 40), 32, 4, 0)  # 32 streams of 80 sequences, in windows of 20
    seen: set[tuple[int, int]] = set()
    opened = []
    for turn in range(order.stream_length):
        blocks = {(row, sequence // BLOCK) for row, sequence in places(order, turn * 32, (turn + 1) * 32)}
        opened.append(len(blocks - seen))
        seen |= blocks
    # At the start of an epoch all streams open their first window; later each turn opens about 32 / 5 blocks, never most of
    # the 32 streams at once.
    assert max(opened[10:]) <= 16


def test_a_split_without_sequences_is_refused() -> None:
    with pytest.raises(InputError, match="no sequence"):
        Order(np.array([0, 0]), 4, 1, 0)
