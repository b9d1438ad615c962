"""Statistics of a dataset's training sequences that the manifest does not hold, from a bounded sample of its blocks.

Every species gives blocks in proportion to its blocks, at least one, evenly spaced over its shards from a random beginning
(systematic sampling; Cochran, "Sampling Techniques", 1977, chapter 8), so that no chromosome is left out by chance. What is
counted over all species is weighted by tokens of the species to tokens of its sample. A small dataset is read whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import progress
from data_prep.codec import Codec
from data_prep.dataset import Dataset

BLOCKS = 4096  # read at most, or one a species: about a GB, some seconds
GC_BINS = 50  # of equal width, from 0 to 100 %


@dataclass(frozen=True)
class Sample:
    """What was counted."""

    blocks: int  # read
    blocks_in_all: int
    tokens: NDArray[np.int64]  # [species] in the sample
    bases: NDArray[np.int64]  # [species] that they spell
    gc: NDArray[np.float64]  # [species] how many of `bases` are G or C
    gc_sequences: NDArray[np.float64]  # [species, GC_BINS] sequences of the dataset by their share of G and C
    token_uses: NDArray[np.float64]  # [vocabulary] uses in the dataset
    length_counts: NDArray[np.float64]  # [sequence length - 1] sequences of the dataset by their content tokens


def draw(dataset: Dataset, codec: Codec, seed: int = 0, limit: int = BLOCKS) -> Sample:
    """Count in about `limit` blocks of the training split, or one a species; in all of them when they are no more.

    Equal arguments give equal results. Raises DamagedBlock naming a block that is not what was written.
    """
    split, species = dataset.split("train"), dataset.manifest["species"]
    bases_of, gc_of, size = codec.token_bases, gc_bases(codec), codec.vocab_size
    tokens, bases, gc = np.zeros(len(species), np.int64), np.zeros(len(species), np.int64), np.zeros(len(species))
    gc_sequences, uses = np.zeros((len(species), GC_BINS)), np.zeros(size)
    length_counts = np.zeros(dataset.manifest["sequence_length"] - 1)
    chosen = choose(split.shards, len(species), seed, limit)
    for number, blocks in enumerate(progress(chosen, total=len(species), unit="species sampled")):
        if not len(blocks):
            continue
        mine, mine_lengths = np.zeros(size, np.int64), np.zeros(len(length_counts), np.int64)
        for row, block_number in blocks.tolist():
            block = split.read_block(row, block_number)
            first = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
            share = np.add.reduceat(gc_of[block.tokens], first) / np.add.reduceat(bases_of[block.tokens], first)
            # A share on the edge of two bins must not fall by rounding.
            bins = np.minimum(share * GC_BINS + 1e-9, GC_BINS - 1).astype(np.int64)
            gc_sequences[number] += np.bincount(bins, minlength=GC_BINS)
            mine += np.bincount(block.tokens, minlength=size)
            mine_lengths += np.bincount(block.lengths, minlength=len(length_counts))
        tokens[number], bases[number], gc[number] = mine.sum(), mine @ bases_of, mine @ gc_of
        weight = species[number]["tokens"]["train"] / tokens[number]
        uses += weight * mine
        length_counts += weight * mine_lengths
        gc_sequences[number] *= weight
    read = sum(map(len, chosen))
    return Sample(read, int(split.shards["blocks"].sum()), tokens, bases, gc, gc_sequences, uses, length_counts)


def choose(shards: NDArray[np.void], species: int, seed: int, limit: int) -> list[NDArray[np.int64]]:
    """Of each species the blocks to read: [blocks, 2], row of the shard table and number in the shard."""
    in_all, chosen = max(1, int(shards["blocks"].sum())), []
    for number in range(species):
        rows = np.flatnonzero(shards["species"] == number)
        ends = np.cumsum(shards["blocks"][rows], dtype=np.int64)
        have = int(ends[-1]) if len(ends) else 0
        take = have if in_all <= limit else min(have, max(1, have * limit // in_all))
        beginning = np.random.default_rng([seed, number]).random()
        blocks = ((np.arange(take) + beginning) * have / max(1, take)).astype(np.int64)
        of_row = np.searchsorted(ends, blocks, side="right")
        chosen.append(np.column_stack([rows[of_row], blocks - (ends[of_row] - shards["blocks"][rows[of_row]])]))
    return chosen


def gc_bases(codec: Codec) -> NDArray[np.float64]:
    """G and C among the bases that each token stands for [vocabulary].

    A token of overlapping k-mers stands for one base but has the letters of k: it counts with their mean, which makes no
    difference over a sequence but at its ends.
    """
    letters = [codec.decode(np.array([token], np.uint16)) for token in range(codec.vocab_size)]
    share = [(text.count(b"G") + text.count(b"C")) / max(1, len(text)) for text in letters]
    return codec.token_bases * np.array(share)
