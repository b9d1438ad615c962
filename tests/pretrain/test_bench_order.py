"""The order's bench counts right on orders made by hand, and the verb gives its figures."""

import argparse
import json

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.dataset import SEQUENCES_PER_BLOCK
from pretrain import bench_order
from pretrain.bench_order import FIGURES, add_arguments, blocks_read, figures, make_order, run, shard_table, sharing


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def count(at_p, sequences, batch, species=None):
    species = np.zeros(len(sequences), np.uint16) if species is None else np.array(species, np.uint16)
    found = figures(np.array(at_p), np.array(sequences), species, batch)
    assert list(found) == list(FIGURES)
    return found


def test_the_order_of_the_genome():
    found = count(range(1000), [1000], batch=10)
    assert found["neighbours_same_batch"] == pytest.approx(900 / 999)
    assert found["neighbours_within_10_batches"] == 1.0
    assert found["neighbours_apart_p50"] == 0
    assert found["blocks_in_batch"] == found["shards_in_batch"] == found["near_in_batch"] == 1.0


def test_two_streams_side_by_side():
    at_p = np.arange(2 * SEQUENCES_PER_BLOCK).reshape(2, -1).T.reshape(-1)  # 0, 1024, 1, 1025, ...
    found = count(at_p, [len(at_p)], batch=2)
    assert found["neighbours_same_batch"] == 0.0
    assert found["neighbours_apart_p1"] == found["neighbours_apart_p50"] == 1
    assert (found["blocks_in_batch"], found["shards_in_batch"], found["near_in_batch"]) == (2.0, 1.0, 0.0)


def test_neighbours_of_other_shards_and_sequences_that_are_left_out_do_not_count():
    # Shards of 4 and 3 sequences, of which number 2 is left out: the neighbours are (0, 1), (4, 5) and (5, 6).
    found = count([0, 3, 4, 5, 1, 6], [4, 3], batch=2)
    assert found["neighbours_same_batch"] == pytest.approx(1 / 3)  # they are 2, 0 and 1 batches apart
    assert found["neighbours_within_10_batches"] == 1.0
    assert (found["neighbours_apart_p1"], found["neighbours_apart_p50"]) == (0, 1)
    # Batches (0, 3) of one shard, (4, 5) of one, (1, 6) of two, in which nothing is near.
    assert found["shards_in_batch"] == pytest.approx(4 / 3)
    assert found["near_in_batch"] == pytest.approx(4 / 6)


def test_mixtures_of_species():
    apart = count(range(4000), [2000, 2000], batch=10, species=[0, 1])
    assert apart["species_drift_points"] == pytest.approx(50.0)  # one half of the epoch holds the one, one half the other
    assert apart["rarest_species_spread"] == pytest.approx(0.5)
    alternating = count(np.arange(4000).reshape(2, -1).T.reshape(-1), [2000, 2000], batch=10, species=[0, 1])
    assert alternating["species_spread_in_batch"] == alternating["species_drift_points"] == 0.0
    assert alternating["rarest_species_spread"] == 1.0
    shuffled = count(np.random.default_rng(0).permutation(100_000), [50_000, 50_000], batch=10, species=[0, 1])
    assert shuffled["species_spread_in_batch"] == pytest.approx(1.0, abs=0.05)
    assert count(range(40), [40], batch=4)["species_spread_in_batch"] == 0.0  # a single species has nothing to mix


def test_blocks_are_read_once_where_there_is_room():
    order = make_order(shard_table(10, 2), 64, 64)
    steps = order.stream_length // 2
    opened = blocks_read(order, 64, 1, 4, steps, slots=10**6)
    positions = order.epoch_length // 2 // 64 * 64 + np.arange(16, 32) + 64 * np.arange(steps)[:, None]
    rows, inside = order.places(positions.reshape(-1))
    assert opened.sum() == len(set(zip(rows.tolist(), (inside // SEQUENCES_PER_BLOCK).tolist(), strict=True)))
    assert opened[0] == len(set(zip(rows[:16].tolist(), (inside[:16] // SEQUENCES_PER_BLOCK).tolist(), strict=True)))
    assert blocks_read(order, 64, 1, 4, steps, slots=2).sum() > opened.sum()


def test_ranks_share_only_blocks_in_which_streams_begin_or_end():
    found = sharing(20, 2, batch=16)
    assert found["blocks"] - 1 <= found["ranks_1"] <= found["blocks"]
    assert found["ranks_1"] <= found["ranks_3"] <= found["ranks_8"] <= found["stream_pairs"]
    assert found["stream_pairs"] <= found["blocks"] + found["streams"]


def test_the_verb_shuffles(capfd):
    result = run(arguments("shuffle", "--shards", "8", "--batch", "16"))["shuffle"]
    json.dumps(result)
    assert set(result["ours"]) == set(result["full_permutation"]) == set(FIGURES)
    assert result["setting"]["batch"] == 16 and result["setting"]["streams"] % 16 == 0
    assert result["ours"]["neighbours_same_batch"] < 0.01
    out, err = capfd.readouterr()
    assert out == "" and FIGURES["near_in_batch"] in err  # stdout is for the result


def test_the_verb_shuffles_a_dataset(tiny_dataset):
    result = run(arguments("--dataset", str(tiny_dataset), "--batch", "4"))
    assert list(result) == ["shuffle"]
    manifest = json.loads((tiny_dataset / "manifest.json").read_text())
    assert result["shuffle"]["setting"]["sequences"] == manifest["splits"]["train"]["sequences"]


def test_the_verb_scales(monkeypatch, capfd):
    monkeypatch.setattr(bench_order, "STEPS", 64)
    monkeypatch.setattr(bench_order, "SHARING", ((4, 1, 16),))
    result = run(arguments("scale", "--shards", "30", "--streams", "64", "--ranks", "1", "--batch", "32"))["scale"]
    json.dumps(result)
    (cost,), (read,), (shared,) = (result[key] for key in ("costs", "reads", "sharing"))
    assert cost["rank"] == 0 and cost["rows"] == 32 and min(cost["build_s"], cost["seek_s"], cost["step_us"]) > 0
    assert read["streams_a_rank"] == read["streams"] == result["setting"]["streams"] == 64
    assert read["first_16_steps"] >= 64 and read["per_1000_steps"] >= read["at_least"] and read["with_fewer_slots"] >= 1
    assert shared["batch"] == 16
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shards", "0"], "--shards 0"),
        (["scale", "--dataset", "x"], "--dataset"),
        (["scale", "--ranks", "9", "--batch", "8"], "--ranks 9"),
        (["shuffle", "--shards", "1", "--batch", "99999"], "--batch 99999"),
        (["shuffle", "--dataset", "nowhere"], "manifest.json"),
    ],
)
def test_bad_input(argv, said):
    with pytest.raises((InputError, FileNotFoundError), match=said):
        run(arguments(*argv))
