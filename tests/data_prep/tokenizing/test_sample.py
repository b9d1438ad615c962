"""The choice of windows: equal shares of species, by the seed, whatever else there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.inputs.genomes import Genome, find_genomes, read_regions
from data_prep.tokenizing.sample import Sample, chosen


@given(available=st.lists(st.lists(st.integers(1, 100), max_size=30), min_size=1, max_size=6), budget=st.integers(-5, 6000))
def test_shares_are_equal_but_for_what_is_not_there(available: list[list[int]], budget: int) -> None:
    names = [Genome(f"{number}", "", "", Path(f"{number}"), 0) for number in range(len(available))]
    sample = Sample(names, lambda genome: iter(["A" * size for size in available[int(genome.name)]]), budget, 0)
    windows = list(sample)
    assert len(windows) == sum(sample.windows)
    assert sum(map(len, windows)) == sum(sample.bases) <= max(budget, 0)
    whole = [sum(sizes) for sizes in available]
    left = [index for index in range(len(available)) if sample.bases[index] < whole[index]]
    # Who gets less than it has gets as much as anyone, and all is spent, but for less than a window.
    assert not left or max(sample.bases) - min(sample.bases[index] for index in left) <= 100 * len(available)
    assert not left or budget - sum(sample.bases) <= 100


@pytest.mark.parametrize("budget", [0, 70, 3700, 10_000])
def test_the_choice_of_windows(budget: int) -> None:
    sizes = np.full(100, 100)
    taken = chosen("yeast", 3, sizes, budget)
    assert taken.sum() == budget // 100
    assert np.array_equal(taken, chosen("yeast", 3, sizes, budget))
    assert not (taken & ~chosen("yeast", 3, sizes, budget + 500)).any()
    if budget == 3700:
        assert not np.array_equal(taken, chosen("yeast", 4, sizes, budget))
        assert not np.array_equal(taken, chosen("fly", 3, sizes, budget))


def test_a_sample_of_genomes(genomes: Path) -> None:
    found = find_genomes(genomes)

    def windows_of(genome: Genome) -> Iterator[bytes]:
        return (region.bases for region in read_regions(genome.path, 1000))

    def draw(budget: int, seed: int) -> Sample[bytes]:
        return Sample(found, windows_of, budget, seed)

    sample = draw(10_000, 0)
    windows = list(sample)
    assert len(windows) == sum(sample.windows) and 9000 < sum(map(len, windows)) == sum(sample.bases) <= 10_000
    assert windows == list(sample) == list(draw(10_000, 0)) != list(draw(10_000, 1))
    assert list(draw(10**6, 0)) == [window for genome in found for window in windows_of(genome)]
