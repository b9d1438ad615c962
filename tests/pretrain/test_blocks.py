"""The pool of blocks: what it returns, how often it reads, what it does with damage and with reads that hang."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.dataset import Dataset, Split
from pretrain.blocks import BlockPool, Readers

WIDTH = 126


@pytest.fixture
def copied(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A dataset that a test may damage."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))


def train(path: Path) -> Split:
    return Dataset(path).split("train")


def everything(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Rows and sequences of the whole split, shuffled."""
    counts = split.shards["sequences"].astype(int)
    rows = np.repeat(np.arange(len(counts)), counts)
    sequences = np.concatenate([np.arange(count) for count in counts])
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order], sequences[order]


def damage(path: Path) -> Path:
    """Flip a bit in the first block of the first shard."""
    tar = min((path / "train").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    return tar


@pytest.mark.parametrize(("capacity", "threads"), [(100, 1), (100, 4), (3, 1), (3, 4), (1, 2)])
def test_any_selection_is_what_the_blocks_hold(tiny_dataset: Path, capacity: int, threads: int) -> None:
    split = train(tiny_dataset)
    rows, sequences = everything(split)
    pool = BlockPool(split, WIDTH, capacity, threads)
    for start in range(0, 2000, 500):
        part = slice(start, start + 500)
        tokens, lengths = pool.read(rows[part], sequences[part])
        for row, sequence, found, length in zip(rows[part], sequences[part], tokens, lengths, strict=True):
            stored = split.read_block(row, sequence // 1024).sequence(sequence % 1024)
            assert found[:length].tolist() == stored.tolist()


def test_each_block_is_read_once_and_the_oldest_goes_first(tiny_dataset: Path) -> None:
    split = train(tiny_dataset)
    rows, sequences = everything(split)
    pool = BlockPool(split, WIDTH, 1000)
    for start in range(0, len(rows), 100):
        pool.read(rows[start : start + 100], sequences[start : start + 100])
    assert pool.blocks_read == split.shards["blocks"].sum()

    two = BlockPool(split, WIDTH, 2)
    for row in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, as 0 was used later
        two.read(np.array([row]), np.array([0]))
    assert two.blocks_read == 4


def test_a_damaged_block_is_an_error_or_is_left_out(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = damage(copied)
    rows, sequences = np.array([0, 1]), np.array([3, 3])
    with pytest.raises(InputError, match=rf"{tar}: block 0 at offset 0"):
        BlockPool(train(copied), WIDTH, 10).read(rows, sequences)
    for remove in (False, True):
        if remove:
            tar.unlink()
        pool = BlockPool(train(copied), WIDTH, 10, skip_damaged=True)
        for _ in range(2):
            _, lengths = pool.read(rows, sequences)
            assert lengths[0] == 0 and lengths[1] > 0
        message = capsys.readouterr().err
        assert message.count("skipped") == 1 and f"{tar}: block 0 at offset 0" in message


def test_a_slot_taken_over_from_a_damaged_block_is_whole(copied: Path) -> None:
    damage(copied)
    pool = BlockPool(train(copied), WIDTH, 1, skip_damaged=True)
    first, one = np.array([0]), np.array([1])
    assert pool.read(first, one)[1] == [0]
    assert pool.read(one, one)[1] > [0]
    assert pool.read(first, one)[1] == [0]


def test_a_sequence_longer_than_the_manifest_says_is_refused(tiny_dataset: Path) -> None:
    with pytest.raises(InputError, match=r"block 0 .* has a sequence of 126 tokens, the manifest allows 100"):
        BlockPool(train(tiny_dataset), 100, 4).read(np.array([0]), np.array([0]))


@pytest.mark.parametrize("threads", [1, 4])
def test_a_read_that_hangs_is_named(copied: Path, threads: int) -> None:
    tar = min((copied / "train").glob("*.tar"))
    tar.unlink()
    os.mkfifo(tar)  # opening it waits for a writer
    pool = BlockPool(train(copied), WIDTH, 10, threads)
    assert pool.in_flight() == "no block is being read"
    errors: list[Exception] = []

    def read() -> None:
        try:
            pool.read(np.array([0, 1]), np.array([0, 0]))
        except OSError as error:  # a pipe can't seek
            errors.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + 10
    while not pool.in_flight().startswith(f"reading block 0 of {tar}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.in_flight().startswith(f"reading block 0 of {tar}")
    tar.open("wb").close()  # ends the wait
    reader.join(10)
    assert not reader.is_alive() and len(errors) == 1
    assert pool.in_flight() == "no block is being read"


def test_readers_do_all_and_pass_on_an_error() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 7:
            raise ValueError("seven")
        done.append(item)

    readers = Readers(3)
    readers.map(work, range(5))
    with pytest.raises(ValueError, match="seven"):
        readers.map(work, range(5, 10))
    assert sorted(done) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
