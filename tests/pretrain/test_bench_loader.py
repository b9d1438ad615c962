"""The loader comparison runs, all candidates deliver the same tokens, and what isn't installed is named."""

import argparse
import itertools
import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from data_prep.cli import InputError
from pretrain.bench_loader import RESUMED, add_arguments, run
from pretrain.bench_loader_candidates import build_candidates, write_copies, write_synthetic
from pretrain.config import load_config
from pretrain.loader import open_dataset
from pretrain.masking import CLS, SEP

SEQUENCES = 2048
SIZES = ["train.global_batch_size=256", "train.micro_batch_size=64"]
ALWAYS = {"ours", "ours_plain", "webdataset", "webdataset_blocks"}


def verb(*argv):
    """Run it, with overrides and flags in addition."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    overrides, flags = [a for a in argv if "=" in a], [a for a in argv if "=" not in a]
    short = ["--sequences", str(SEQUENCES), "--seconds", "0.05", "--rounds", "1"]
    return run(parser.parse_args(["tiny", *SIZES, *overrides, *short, *flags]))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(configuration with a synthetic dataset, its copies)"""
    path = tmp_path_factory.mktemp("bench")
    dataset = write_synthetic(path / "dataset", SEQUENCES)
    config = load_config("tiny", [*SIZES, f"data.path={dataset}", "data.read_threads=1"])
    return config, write_copies(open_dataset(config)[1], SEQUENCES, path)


@pytest.fixture(scope="module")
def candidates(setting):
    return build_candidates(*setting)[0]


def delivered(name, batches):
    """How often each sequence of content tokens comes."""
    found = Counter()
    for batch in batches:
        ids, starts = np.asarray(batch.ids), np.asarray(batch.starts)
        if name == "webdataset_blocks":
            parts = np.split(ids, np.cumsum(starts, dtype=np.int64)[:-1])
        else:
            assert batch.ids.dtype == torch.int64 and batch.starts.dtype == torch.int32
            parts = [ids[start:end] for start, end in itertools.pairwise(starts.tolist())]
            assert all(part[0] == CLS and part[-1] == SEP for part in parts)
            parts = [part[1:-1] for part in parts]
        assert batch.content == sum(map(len, parts))
        found.update(part.astype(np.uint16).tobytes() for part in parts)
    return found


def test_all_deliver_the_same_sequences_once_a_pass(setting, candidates):
    dataset = open_dataset(setting[0])[1]
    split = dataset.split("train")
    stored = Counter()
    for row, blocks in enumerate(split.shards["blocks"]):
        for number in range(int(blocks)):
            block = split.read_block(row, number)
            stored.update(part.tobytes() for part in np.split(block.tokens, np.cumsum(block.lengths, dtype=np.int64)[:-1]))
    assert stored.total() == SEQUENCES
    for name, start in candidates.items():
        if name == "ours":  # masked: only as many tokens
            assert sum(batch.content for batch in start(False)) == sum(map(len, stored)) // 2
        else:
            assert delivered(name, start(False)) == stored, name


def test_a_resumed_pass_gives_its_second_half(candidates):
    for name in candidates.keys() & set(RESUMED):
        found = delivered(name, candidates[name](True))
        assert found.total() == SEQUENCES // 2, name


def test_the_verb(capfd):
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    result = verb()
    json.dumps(result)
    speed = result["tokens_per_second"]
    assert speed.keys() >= ALWAYS and all(value > 0 for value in speed.values())
    assert result["ratio_webdataset"] == speed["ours_plain"] / speed["webdataset"]
    assert result["ratio_webdataset_masked"] == speed["ours"] / speed["webdataset"]
    assert result["ratio_webdataset_blocks"] == speed["ours_plain"] / speed["webdataset_blocks"]
    assert len(set(result["tokens_a_pass"].values())) == 1
    assert result["resume_seconds"].keys() == speed.keys() & set(RESUMED)
    assert set(result["resume_parts"]["ours"]) == {"open", "first_batch"}
    assert result["setting"]["dataset"] == "synthetic" and result["setting"]["micro_batch"] == 64
    assert result["versions"]["webdataset"]
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)  # as they were
    output = capfd.readouterr()
    assert "ours / webdataset" in output.err and output.out == ""  # stdout is for the result


def test_what_is_not_installed_is_named(monkeypatch, capfd):
    for module in ("megatron.energon", "torchdata.stateful_dataloader"):
        monkeypatch.setitem(sys.modules, module, None)
    result = verb()
    assert result["not_installed"] == ["megatron-energon", "torchdata"]
    assert result["tokens_per_second"].keys() == ALWAYS
    assert result["versions"].keys() == {"python", "torch", "numpy", "webdataset"}
    assert "torchdata is left out" in capfd.readouterr().err


def test_a_given_dataset_is_measured_and_left_alone(setting):
    config, _ = setting
    result = verb("--dataset", config.data.path, "--sequences", "1024")
    assert result["setting"]["dataset"] == open_dataset(config)[1].sha256
    assert (result["setting"]["dataset_sequences"], result["setting"]["sequences"]) == (SEQUENCES, 1024)
    assert result["tokens_a_pass"]["ours"] > 1.9 * result["tokens_a_pass"]["webdataset"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--sequences", "300"], "--sequences.*512"),
        (["data.path=somewhere"], "--dataset DIR"),
        (["--dataset", "nowhere"], r"manifest\.json: not found"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(InputError, match=message):
        verb(*argv)
