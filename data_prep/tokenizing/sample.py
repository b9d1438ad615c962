"""A seeded sample of the genomes, stratified by species, within a budget in bases, and streamed.

Each species gets an equal share of the budget; what small genomes leave goes to the others. Within a species the windows
with the lowest keyed hash are taken, so the sample depends on the seed and the genomes only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import progress
from data_prep.inputs.genomes import Genome
from data_prep.kmers import mix

Window = TypeVar("Window", bound=Sized)  # a text, of so many bases


class Sample(Generic[Window]):
    """The chosen windows, read one at a time. Making it reads all genomes once; each iteration reads them again.

    Memory is four bytes a window of all genomes, chosen or not.

    Args:
        genomes: from which; each is a species.
        windows_of: all windows of a genome, in an order that is always the same.
        budget: bases to choose at most.
        seed: chooses.

    Attributes:
        bases, windows: chosen of each genome [genomes].
    """

    def __init__(
        self, genomes: Sequence[Genome], windows_of: Callable[[Genome], Iterator[Window]], budget: int, seed: int
    ) -> None:
        self.genomes, self.windows_of, self.seed = genomes, windows_of, seed
        self._sizes = [
            np.fromiter(map(len, windows_of(genome)), np.int32)
            for genome in progress(genomes, total=len(genomes), unit="files")
        ]
        self._shares, self.bases, self.windows = ([0] * len(genomes) for _ in range(3))
        available = [int(sizes.sum(dtype=np.int64)) for sizes in self._sizes]
        left = max(budget, 0)
        for done, index in enumerate(sorted(range(len(genomes)), key=available.__getitem__)):
            self._shares[index] = left // (len(genomes) - done)
            taken = self._sizes[index][self._taken(index)]
            self.bases[index], self.windows[index] = int(taken.sum(dtype=np.int64)), len(taken)
            left -= self.bases[index]

    def _taken(self, index: int) -> NDArray[np.bool_]:
        return chosen(self.genomes[index].name, self.seed, self._sizes[index], self._shares[index])

    def __iter__(self) -> Iterator[Window]:
        for index, genome in enumerate(self.genomes):
            if self.windows[index]:
                for window, take in zip(self.windows_of(genome), self._taken(index), strict=True):
                    if take:
                        yield window


def chosen(species: str, seed: int, sizes: NDArray[np.integer], budget: int) -> NDArray[np.bool_]:
    """Which of a species' windows are in the sample [windows]: those with the lowest hashes that are `budget` bases at most.

    `sizes` [windows] in bases.
    """
    key = hashlib.blake2b(json.dumps([seed, species]).encode(), digest_size=8).digest()
    # SplitMix64; `mix` is a bijection of 64-bit numbers, so no two windows have the same hash.
    hashes = mix(np.arange(len(sizes), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(key, "<u8")[0])
    order = np.argsort(hashes)
    count = int(np.searchsorted(np.cumsum(sizes[order], dtype=np.int64), budget, side="right"))
    taken = np.zeros(len(sizes), dtype=np.bool_)
    taken[order[:count]] = True
    return taken
