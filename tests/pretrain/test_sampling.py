from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.cli import InputError
from data_prep.dataset import SHARD_ROW
from pretrain.config import SamplingConfig
from pretrain.sampling import apportion, draws

SPECIES = [
    {"name": "human", "category": "vertebrates"},
    {"name": "mouse", "category": "vertebrates"},
    {"name": "yeast", "category": "fungi"},
    {"name": "phage", "category": "viruses"},
]


def shards(*sequences: tuple[int, int]) -> Any:
    table = np.zeros(len(sequences), SHARD_ROW)
    table["species"], table["sequences"] = np.array(sequences).T
    return table


# human 600 in two shards, mouse 300, yeast 100, no phage
TABLE = shards((0, 400), (0, 200), (1, 300), (2, 100))


def counts(**settings: Any) -> list[int] | None:
    return draws(SamplingConfig(**settings), SPECIES, TABLE, "dataset")


def test_natural_shares_are_every_sequence_once() -> None:
    assert counts() is None


def test_temperature_moves_shares_towards_each_other() -> None:
    roots = np.sqrt([600, 300, 100])
    assert counts(temperature=2) == [*(np.round(1000 * roots / roots.sum()).astype(int)), 0]
    assert counts(temperature=1e9) == [334, 333, 333, 0]
    assert counts(temperature=1e-6) == [1000, 0, 0, 0]


def test_weights_are_of_a_species_or_of_a_category_by_size() -> None:
    assert counts(weights={"vertebrates": 9, "fungi": 1, "phage": 0}) == [600, 300, 100, 0]
    assert counts(weights={"human": 1, "vertebrates": 2, "yeast": 1, "viruses": 0}) == [250, 500, 250, 0]
    assert counts(weights={"human": 1e-3, "mouse": 0, "yeast": 0, "phage": 0}) == [1000, 0, 0, 0]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"human": 1, "mouse": 1, "yeats": 1, "phage": 0}, "no species or category yeats"),
        ({"human": 1, "mouse": 1}, "no weight for yeast, phage of dataset"),
        ({"vertebrates": 1, "fungi": 1, "phage": 1}, r"weights\.phage: dataset has no training sequence"),
        ({"vertebrates": 1, "fungi": 1, "viruses": 1}, r"weights\.viruses: dataset has no training sequence"),
        ({"vertebrates": 0, "fungi": 0, "phage": 0}, "nothing of dataset is left"),
        ({"human": 1, "mouse": 1, "yeast": 1e-9, "phage": 0}, "yeast of dataset would never come"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        counts(weights=weights)
    with pytest.raises(ValidationError, match="exclude each other"):
        SamplingConfig(weights=weights, temperature=2)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda shares: sum(shares) > 0), st.integers(0, 10**12))
def test_apportioned_numbers_are_whole_and_near(shares: list[float], total: int) -> None:
    exact = np.array(shares) / sum(shares)
    found = apportion(exact, total)
    assert sum(found) == total
    assert all(abs(count - share * total) < 1 + 1e-3 * len(shares) for count, share in zip(found, exact, strict=True))
