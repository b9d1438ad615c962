"""How many sequences each species gives to an epoch: natural, tempered or explicit shares."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, log
from pretrain.config import SamplingConfig


def draws(
    config: SamplingConfig, species: list[dict[str, Any]], shards: NDArray[np.void], source: str, report: bool = False
) -> list[int] | None:
    """Sequences of each species in an epoch, which is as long as the training split.

    Args:
        config: the shares.
        species: the manifest's table, with `name` and `category` of each row.
        shards: the training split's table, rows of SHARD_ROW.
        source: named in errors.
        report: log how often an epoch passes over the most and the least drawn species.

    Returns:
        [species], or None for the natural shares: every sequence once an epoch.

    Raises InputError when explicit weights name nothing in the dataset, leave a species out or ask for one that has no
    sequence.
    """
    if config == SamplingConfig():
        return None
    available = np.bincount(shards["species"], weights=shards["sequences"], minlength=len(species)).astype(np.int64)
    if available.sum() == 0:
        return None  # the order says so
    if config.weights is not None:
        shares = _explicit(config.weights, species, available, source)
    else:
        shares = (available / available.max()) ** (1.0 / config.temperature)  # the largest is 1: they can't all vanish
    counts = apportion(shares / shares.sum(), int(available.sum()))
    for row, share, count in zip(species, shares, counts, strict=True):
        if share > 0 and count == 0 and config.weights is not None:
            raise InputError(f"data.sampling.weights: {row['name']} of {source} would never come; give it more, or 0")
    if report:
        passes = sorted((count / n, row["name"]) for row, count, n in zip(species, counts, available, strict=True) if n)
        (least, rare), (most, frequent) = passes[0], passes[-1]
        log(f"{source}: an epoch passes {most:.3g} times over {frequent}, {least:.3g} times over {rare}")
    return counts


def _explicit(
    weights: dict[str, float], species: list[dict[str, Any]], available: NDArray[np.integer], source: str
) -> NDArray[np.float64]:
    """A species' own weight, or its part, by size, of its category's."""
    names, categories = {row["name"] for row in species}, {row["category"] for row in species}
    unknown = sorted(weights.keys() - names - categories)
    if unknown:
        raise InputError(f"data.sampling.weights: {source} has no species or category {', '.join(unknown)}")
    # The key that a species takes its weight from, and how many sequences share that weight.
    keys = [row["name"] if row["name"] in weights else row["category"] for row in species]
    missing = [row["name"] for row, key in zip(species, keys, strict=True) if key not in weights]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"data.sampling.weights: no weight for {shown} of {source}; 0 leaves a species out")
    together = dict.fromkeys(keys, 0)
    for key, count in zip(keys, available.tolist(), strict=True):
        together[key] += count
    for key, count in together.items():
        if weights[key] > 0 and count == 0:
            raise InputError(f"data.sampling.weights.{key}: {source} has no training sequence of it; set it to 0")
    if not any(weights[key] for key in keys):
        raise InputError(f"data.sampling.weights: nothing of {source} is left to train on")
    return np.array([weights[key] * count / max(1, together[key]) for key, count in zip(keys, available, strict=True)])


def apportion(shares: NDArray[np.float64], total: int) -> list[int]:
    """Whole numbers in proportion to `shares`, which sum to 1, that sum to `total`: largest remainders first."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[largest] += 1
    return [int(count) for count in counts]
