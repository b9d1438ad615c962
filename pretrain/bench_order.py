"""`python -m pretrain bench-order`: how well the order of training shuffles, and what it costs at scale. Reads no sequence.

Part `shuffle` walks through one epoch and puts each figure beside that of a full random permutation of the same sequences.
Part `scale` writes the shard table of a large dataset, has fresh processes measure what the order costs a rank in seconds
and memory, counts in a simulation what blocks ranks read, and computes bytes and rates from that.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import timeit
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, log
from data_prep.dataset import SEQUENCES_PER_BLOCK, SHARD_ROW, Dataset
from data_prep.finalize import WINDOW_BLOCKS, streams_of
from data_prep.storage import file_sha256
from pretrain.blocks import slot_bytes, slots_needed
from pretrain.order import Ints, Order, rank_rows, streams_in_use

PARTS = ("shuffle", "scale")
SMALL = (1024, 10)  # shards, and blocks a shard: what part `shuffle` makes up
LARGE = (1_000_000, 40)  # the same of part `scale`: 10 TB of tokens
SHARING = ((1000, 4, 512), (12, 1, 2048))  # shards, blocks a shard, batch; in the second, more rows than streams
SHARING_RANKS = (1, 3, 8, 100)
RUNS = ((8, 4096), (1000, 16384), (10_000, 16384), (10_000, 65536))  # (ranks, batch) whose reads are followed
NEAR = 100  # sequences: about 50,000 bases
CONTENT_TOKENS = 126  # of a full sequence; [CLS] and [SEP] make it 128
BLOCK_BYTES = 287_744  # of a full block in its tar, which is also the size of a read
STEPS = 8192  # followed for each rank; in the second half nothing is left of the burst at the start
AT_ONCE = 1 << 18  # positions a call

FIGURES = {
    "neighbours_same_batch": "share of neighbours in the genome (sequence i and i + 1 of a shard) that fall into one batch",
    "neighbours_within_10_batches": "share of neighbours that come within 10 batches of each other",
    "neighbours_apart_p1": "batches between neighbours: 1 % of them are at most so far apart",
    "neighbours_apart_p10": "the same for 10 %",
    "neighbours_apart_p50": "the same for half of them",
    "blocks_in_batch": "blocks that a batch draws from, on average",
    "shards_in_batch": "shards that a batch draws from, on average",
    "near_in_batch": f"share of sequences with another one of their batch at most {NEAR} sequences away in the genome",
    "species_spread_in_batch": "spread of a species' count over batches; 1: as if each sequence were drawn by chance",
    "species_drift_points": "largest change of a species' share in any hundredth of the epoch, in percentage points",
    "rarest_species_spread": "share of the hundredths of the epoch in which the rarest species comes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this part (default: both)")
    parser.add_argument("--dataset", metavar="DIR", help="shuffle a finished dataset instead of a made-up table")
    parser.add_argument("--shards", type=int, metavar="N", help="of the table (default: 1024 to shuffle, 1000000 for scale)")
    parser.add_argument("--streams", type=int, metavar="S", help="of the order (default: as `finalize` chooses)")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences a step (default: 256 to shuffle, or several)")
    parser.add_argument("--ranks", type=int, metavar="N", help="of the run in part scale (default: several)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: measure and log tables."""
    for name in ("shards", "streams", "batch", "ranks"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.dataset is not None and (args.part == "scale" or args.shards is not None):
        raise InputError("--dataset: goes with part shuffle and without --shards; leave one of them out")
    parts = PARTS if args.part is None and args.dataset is None else (args.part or "shuffle",)
    result: dict[str, Any] = {}
    if "shuffle" in parts:
        result["shuffle"] = shuffle(args)
    if "scale" in parts:
        ranks, batch = args.ranks or 10_000, args.batch or 16384
        if ranks > batch:
            raise InputError(f"--ranks {ranks}: some would get nothing of a batch of {batch}; take a larger --batch")
        runs = RUNS if args.ranks is None and args.batch is None else ((ranks, batch),)
        result["scale"] = scale(args.shards or LARGE[0], args.streams, runs)
    return result


def shard_table(shards: int, blocks: int) -> NDArray[np.void]:
    """A made-up shards.npy: 0.5 to 1.5 times `blocks` a shard; 100 species, shares in proportion to 1 / (number + 1)."""
    table = np.zeros(shards, SHARD_ROW)
    half = blocks * SEQUENCES_PER_BLOCK // 2
    table["shard"] = np.arange(shards)
    table["sequences"] = np.random.default_rng(0).integers(half, 3 * half, shards, endpoint=True)
    table["blocks"] = -(-table["sequences"].astype(np.int64) // SEQUENCES_PER_BLOCK)
    ends = np.cumsum(1 / np.arange(1, 101))
    table["species"] = np.searchsorted(ends / ends[-1], (np.arange(shards) + 0.5) / shards, side="right")
    table["tokens"] = table["sequences"] * CONTENT_TOKENS
    table["bytes"] = table["blocks"].astype(np.int64) * BLOCK_BYTES
    return table


def shuffle(args: argparse.Namespace) -> dict[str, Any]:
    """Part `shuffle`: the setting, and FIGURES of our order and of a full permutation."""
    shards, streams, window = shard_table(args.shards or SMALL[0], SMALL[1]), args.streams, WINDOW_BLOCKS
    if args.dataset is not None:
        dataset = Dataset(args.dataset)
        shards, settings = dataset.split("train").shards, dataset.manifest["order"]
        streams, window = streams or settings["streams"], settings["window_blocks"]
    sequences, species, batch = shards["sequences"].astype(np.int64), shards["species"], args.batch or 256
    if batch > (total := int(sequences.sum())):
        raise InputError(f"--batch {batch}: more than the {total} sequences; take a smaller one")
    order = make_order(shards, streams_of(streams, total), batch, window)
    starts = np.cumsum(sequences) - sequences
    ours = np.concatenate([starts[rows] + inside for rows, inside in epoch_places(order)])
    full = np.random.default_rng(0).permutation(total)[: len(ours)]
    setting = {"shards": len(shards), "sequences": total, "batch": batch}
    setting |= {"streams": order.streams, "stream_length": order.stream_length, "window": order.window}
    found = {name: figures(at_p, sequences, species, batch) for name, at_p in (("ours", ours), ("full_permutation", full))}
    _table("Shuffling", [setting])
    log(f"{'ours':>12} {'full permutation':>18}")
    for key, meaning in FIGURES.items():
        log(f"{found['ours'][key]:12.5g} {found['full_permutation'][key]:18.5g}  {meaning}")
    return {"setting": setting, **found}


def make_order(shards: NDArray[np.void], streams: int, batch: int, window: int = WINDOW_BLOCKS) -> Order:
    """The order of a run, made as the loader makes it, of a table of shards and the dataset's `streams`."""
    sequences = np.ascontiguousarray(shards["sequences"], np.int64)
    streams = streams_in_use(streams, batch, int(sequences.sum()))
    return Order(sequences, streams, window, seed=0, species=shards["species"], batch_size=batch)


def epoch_places(order: Order) -> Iterator[tuple[Ints, Ints]]:
    """(rows, sequences) of the positions of epoch 0, piece by piece."""
    for start in range(0, order.epoch_length, AT_ONCE):
        yield order.places(np.arange(start, min(start + AT_ONCE, order.epoch_length)))


def figures(at_p: Ints, sequences: Ints, species: NDArray[np.integer], batch: int) -> dict[str, float]:
    """FIGURES of an order.

    Args:
        at_p: int64 [positions], which sequence comes at each position, counted from the first sequence of the first shard.
        sequences: int64 [shards], sequences of each shard.
        species: [shards], the species of each.
        batch: sequences a batch; positions beyond the last whole batch count for neighbours only.
    """
    shard_n = np.repeat(np.arange(len(sequences)), sequences)
    batches = len(at_p) // batch
    at_bk = at_p[: batches * batch].reshape(batches, batch)
    return {
        **_neighbours(at_p, shard_n, batch),
        **_within_batches(np.sort(at_bk, axis=1), shard_n, sequences),
        **_mixture(species[shard_n[at_bk]].astype(np.int64)),
    }


def _neighbours(at_p: Ints, shard_n: Ints, batch: int) -> dict[str, float]:
    batch_n = np.full(len(shard_n), -1)  # a sequence that is left out has no batch
    batch_n[at_p] = np.arange(len(at_p)) // batch
    both = (shard_n[1:] == shard_n[:-1]) & (batch_n[1:] >= 0) & (batch_n[:-1] >= 0)
    apart = np.abs(np.diff(batch_n))[both]
    return {
        "neighbours_same_batch": float(np.mean(apart == 0)),
        "neighbours_within_10_batches": float(np.mean(apart <= 10)),
        **{f"neighbours_apart_p{share}": int(np.percentile(apart, share, method="inverted_cdf")) for share in (1, 10, 50)},
    }


def _within_batches(sorted_bk: Ints, shard_n: Ints, sequences: Ints) -> dict[str, float]:
    starts, blocks = np.cumsum(sequences) - sequences, -(-sequences // SEQUENCES_PER_BLOCK)
    shard_bk = shard_n[sorted_bk]
    block_bk = (np.cumsum(blocks) - blocks)[shard_bk] + (sorted_bk - starts[shard_bk]) // SEQUENCES_PER_BLOCK
    close = (np.diff(sorted_bk) <= NEAR) & (np.diff(shard_bk) == 0)
    near = np.pad(close, ((0, 0), (0, 1))) | np.pad(close, ((0, 0), (1, 0)))
    return {
        "blocks_in_batch": float(np.mean(1 + np.count_nonzero(np.diff(block_bk), axis=1))),
        "shards_in_batch": float(np.mean(1 + np.count_nonzero(np.diff(shard_bk), axis=1))),
        "near_in_batch": float(np.mean(near)),
    }


def _mixture(species_bk: Ints) -> dict[str, float]:
    batches, batch = species_bk.shape
    kinds = int(species_bk.max()) + 1
    cells = species_bk + kinds * np.arange(batches)[:, None]
    counts = np.bincount(cells.reshape(-1), minlength=batches * kinds).reshape(batches, kinds)
    share = counts.mean(axis=0) / batch
    chance = float((batch * share * (1 - share)).sum())  # variance of binomial counts, summed over species
    until = np.concatenate([np.zeros((1, kinds), np.int64), np.cumsum(counts, axis=0)])
    window = max(1, batches // 100)
    drift = np.abs((until[window:] - until[:-window]) / (window * batch) - share).max()
    hundredths = np.diff(until[np.arange(0, batches + 1, window)], axis=0)
    rarest = int(np.where(share > 0, share, 1).argmin())
    return {
        "species_spread_in_batch": math.sqrt(float(counts.var(axis=0).sum()) / chance) if chance else 0.0,
        "species_drift_points": 100 * float(drift),
        "rarest_species_spread": float(np.mean(hundredths[:, rarest] > 0)),
    }


def scale(shards: int, streams: int | None, runs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Part `scale`: how the mixture drifts, what an order costs a rank, what ranks read, which blocks two ranks read."""
    table = shard_table(shards, LARGE[1])
    total = int(table["sequences"].sum())
    streams = streams_of(streams, total)
    ranks, batch = runs[len(runs) // 2]
    setting = {"shards": shards, "sequences": total, "bytes": int(table["bytes"].sum()), "streams": streams}
    drifted = drift(make_order(table, streams, streams), table["species"])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shards.npy"
        np.save(path, table, allow_pickle=False)
        costs = []
        for rank in sorted({0, ranks // 2, ranks - 1}):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a fresh process each
                costs.append(pool.submit(rank_cost, path, streams, batch, rank, ranks).result())
    reads = [
        {"ranks": ranks, "batch": batch, **reading(make_order(table, streams, batch), batch, ranks)} for ranks, batch in runs
    ]
    shared = [sharing(*size) for size in SHARING]
    _table("Scale", [{**setting, "species_drift_points": drifted}])
    _table("What the order costs a rank, each measured in a fresh process", costs)
    _table("Blocks that a rank reads when it starts in the middle of an epoch", reads)
    _table("Pairs (rank, block) in an epoch for some numbers of ranks, and pairs (stream, block)", shared)
    return {"setting": setting, "species_drift_points": drifted, "costs": costs, "reads": reads, "sharing": shared}


def rank_cost(path: Path, streams: int, batch: int, rank: int, ranks: int) -> dict[str, Any]:
    """Seconds and memory that a rank spends on the order of the table at `path`; memory on Linux only.

    `check`: the sum of shards.npy, which opening a dataset compares; `build`: read the table and make the order; `seek`: the
    first places, mid-epoch; `step`: the places of a step, in bulk as in the loader; memory: after the third epoch's end.
    """
    from pretrain.loader import PLACES_AT_ONCE  # here, because it imports all of training

    make_order(shard_table(9, 1), 4, 4).places(np.arange(40))  # code that is loaded at its first use
    rows = np.array(rank_rows(batch, rank, ranks), np.int64)
    before, clock = _memory(), [time.perf_counter()]
    file_sha256(path)
    clock.append(time.perf_counter())
    shards = np.load(path, mmap_mode="r", allow_pickle=False)
    order = make_order(shards, streams, batch)
    clock.append(time.perf_counter())
    order.places(order.epoch_length // 2 // batch * batch + rows)
    clock.append(time.perf_counter())
    for epoch in range(1, 4):
        order.places(epoch * order.epoch_length + rows)
    growth = {key: value - before[key] for key, value in _memory().items()}
    steps = max(1, PLACES_AT_ONCE // len(rows))
    positions = (3 * order.epoch_length + rows + batch * np.arange(steps)[:, None]).reshape(-1)
    seconds = statistics.median(timeit.repeat(lambda: order.places(positions), number=1, repeat=15)) / steps
    check, build, seek = np.diff(clock).tolist()
    spent = {"check_s": check, "build_s": build, "seek_s": seek, "step_us": 1e6 * seconds}
    return {"ranks": ranks, "batch": batch, "rank": rank, "rows": len(rows), **spent, **growth}


def _memory() -> dict[str, float]:
    """MB of this process: its own, pages of mapped files (which the ranks of a node share), the most of both together."""
    rollup, status = Path("/proc/self/smaps_rollup"), Path("/proc/self/status")
    if not rollup.is_file():
        return {}
    lines = [line.split() for file in (rollup, status) for line in file.read_text().splitlines()]
    kilobytes = {words[0]: int(words[1]) for words in lines if words[-1] == "kB"}
    own, both = kilobytes["Anonymous:"], kilobytes["Rss:"]
    return {"own_mb": own * 1.024e-3, "mapped_mb": (both - own) * 1.024e-3, "peak_mb": kilobytes["VmHWM:"] * 1.024e-3}


def reading(order: Order, batch: int, ranks: int) -> dict[str, float]:
    """What a rank reads that starts in the middle of epoch 0: blocks, an average of up to 16 ranks, and what they amount to.

    `at_least`: in a thousand steps, if every block were full and read once. `most_in_a_step`: of any rank, after the start.
    `with_fewer_slots`: how many times as many blocks are read if the pool has a slot a stream less.
    """
    rows = -(-batch // ranks)
    streams = min(order.streams, -(-rows * order.streams // batch))
    slots = slots_needed(streams, WINDOW_BLOCKS)
    count = max(1, min(ranks, 16, (1 << 22) // (rows * STEPS)))
    middle = (ranks - count) // 2
    read = np.stack([blocks_read(order, batch, rank, ranks, STEPS, slots) for rank in range(middle, middle + count)])
    fewer = blocks_read(order, batch, middle, ranks, STEPS, slots - streams)
    return {
        "streams": order.streams,
        "streams_a_rank": streams,
        "first_16_steps": float(read[:, :16].sum(axis=1).mean()),
        "per_1000_steps": float(1000 * read[:, STEPS // 2 :].mean()),
        "with_fewer_slots": float(fewer[STEPS // 2 :].sum() / max(1, read[0, STEPS // 2 :].sum())),
        "at_least": 1000 * batch / ranks / SEQUENCES_PER_BLOCK,
        "most_in_a_step": int(read[:, STEPS // 2 :].max()),
        "burst_mb": streams * (WINDOW_BLOCKS + 1) * BLOCK_BYTES / 1e6,
        "memory_mb": slots * slot_bytes(CONTENT_TOKENS) / 1e6,
    }


def blocks_read(order: Order, batch: int, rank: int, ranks: int, steps: int, slots: int) -> Ints:
    """int64 [steps]: blocks that a rank reads in each step from the middle of epoch 0 on; it keeps the `slots` last used."""
    rows = np.array(rank_rows(batch, rank, ranks), np.int64)
    first = order.epoch_length // 2 // batch * batch
    positions = (first + rows + batch * np.arange(steps)[:, None]).reshape(-1)
    read, kept = np.zeros(steps, np.int64), OrderedDict[int, None]()
    for start in range(0, len(positions), AT_ONCE):
        shards, inside = order.places(positions[start : start + AT_ONCE])
        for number, block in enumerate(((shards << 32) + inside // SEQUENCES_PER_BLOCK).tolist(), start):
            if block in kept:
                kept.move_to_end(block)
            else:
                kept[block] = None
                read[number // len(rows)] += 1
                if len(kept) > slots:
                    kept.popitem(last=False)
    return read


def drift(order: Order, species: NDArray[np.integer]) -> float:
    """`species_drift_points` from a sample: 100 windows of epoch 0, in each of them four turns of all streams."""
    turns = ((np.arange(400) + 0.5) * order.stream_length / 400).astype(np.int64)
    rows = [order.places(turn * order.streams + np.arange(order.streams))[0] for turn in turns]
    return _mixture(species[np.reshape(rows, (100, -1))].astype(np.int64))["species_drift_points"]


def sharing(shards: int, blocks_a_shard: int, batch: int) -> dict[str, int]:
    """Distinct pairs (rank, block) of an epoch for each of SHARING_RANKS, and distinct pairs (stream, block).

    The first are reads of ranks that have room for all their blocks, the second those of ranks that keep open blocks only.
    """
    table = shard_table(shards, blocks_a_shard)
    sequences, blocks = table["sequences"].astype(np.int64), table["blocks"].astype(np.int64)
    first, total = np.cumsum(blocks) - blocks, int(blocks.sum())
    order = make_order(table, streams_of(None, int(sequences.sum())), batch)
    position_p = np.arange(order.epoch_length)
    rows, inside = (np.concatenate(parts) for parts in zip(*epoch_places(order), strict=True))
    block_p = first[rows] + inside // SEQUENCES_PER_BLOCK
    pairs = {}
    for ranks in SHARING_RANKS:
        rank_b = np.repeat(np.arange(ranks), [len(rank_rows(batch, rank, ranks)) for rank in range(ranks)])
        pairs[f"ranks_{ranks}"] = len(np.unique(rank_b[position_p % batch] * total + block_p))
    pairs["stream_pairs"] = len(np.unique(position_p % order.streams * total + block_p))
    return {"sequences": int(sequences.sum()), "batch": batch, "streams": order.streams, "blocks": total, **pairs}


def _table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Log rows with equal keys as columns."""
    log(f"\n{title}")
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    columns = [list(column) for column in zip(rows[0], *cells, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        log("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
