from __future__ import annotations

import numpy as np
import pytest

from finetune.batches import epoch_order, micro_batches, pack
from kernels.random import PURPOSE_DROPOUT, fork, root_key


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(epoch_order(0, 1, 100), orders[1])


@pytest.mark.parametrize("budget", [1, 50, 120, 10_000])
def test_micro_batches_are_a_partition_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    groups = list(micro_batches(lengths, budget))
    assert sorted(np.concatenate(groups)) == list(range(200))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= budget
    assert len(list(micro_batches(lengths, 200 * int(lengths.max())))) == 1


def test_packed_tokens_are_the_rows(planted_tokens):
    tokens = planted_tokens["dev"]
    rows = np.array([7, 0, 3])
    batch = pack(tokens, rows)
    expected = [tokens.ids[tokens.starts[row] : tokens.starts[row + 1]] for row in rows]
    assert batch.ids_t.tolist() == np.concatenate(expected).tolist()
    assert batch.cu_seqlens.diff().tolist() == [len(part) for part in expected]
    assert batch.max_seqlen == max(map(len, expected))
    assert batch.dropout_keys_t is None


def test_dropout_keys_depend_on_seed_position_and_token_only(planted_tokens):
    tokens = planted_tokens["dev"]
    batch = pack(tokens, np.array([7, 0]), seed=5, positions=np.array([40, 41]))
    alone = pack(tokens, np.array([0]), seed=5, positions=np.array([41]))
    start = int(batch.cu_seqlens[1])
    assert batch.dropout_keys_t is not None
    assert alone.dropout_keys_t is not None
    assert batch.dropout_keys_t[start:].tolist() == alone.dropout_keys_t.tolist()
    expected = fork(fork(np.array([root_key(5, PURPOSE_DROPOUT)]), 41), 2)
    assert int(alone.dropout_keys_t[2]) == int(expected[0])


def test_on_a_cpu_the_default_budget_is_small_and_grows_with_the_threads(monkeypatch):
    lengths = np.random.default_rng(0).integers(3, 60, 2000)
    for threads, most in ((1, 1024), (2, 2048), (64, 16_384)):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        sizes = [len(group) * int(lengths[group].max()) for group in micro_batches(lengths)]
        assert most / 2 < max(sizes) <= most
