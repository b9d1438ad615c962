import numpy as np

from pretrain.config import DataConfig
from pretrain.masking import CLS, FIRST_CONTENT, MASK, SEP, Masking

CONTENT = np.arange(FIRST_CONTENT, FIRST_CONTENT + 126)
DRAWS = 2000


def sequence_ids(count: int) -> np.ndarray:
    return np.tile(np.concatenate([[CLS], CONTENT, [SEP]]), (count, 1))


def lengths(count: int, length: int = 126) -> np.ndarray:
    return np.full(count, length)


def test_shares_are_15_percent_and_80_10_10() -> None:
    ids = sequence_ids(DRAWS)
    chosen, labels = Masking(DataConfig(path=""), vocab_size=4096, seed=3).apply(ids, lengths(DRAWS), np.arange(DRAWS))
    whole = sequence_ids(DRAWS)
    assert (ids[~chosen] == whole[~chosen]).all()
    assert (labels == whole[chosen]).all()
    seen = ids[chosen]
    random = seen[(seen != MASK) & (seen != labels)]
    # Five standard deviations of binomials of these sizes.
    total = DRAWS * len(CONTENT)
    assert abs(len(labels) / total - 0.15) < 5 * (0.15 * 0.85 / total) ** 0.5
    for count, expected in ((np.sum(seen == MASK), 0.8), (np.sum(seen == labels), 0.1), (len(random), 0.1)):
        assert abs(count / len(labels) - expected) < 5 * (expected * (1 - expected) / len(labels)) ** 0.5
    assert random.min() >= FIRST_CONTENT and random.max() > 4000
    # Each place of a sequence alike, and no token's fate tells that of its neighbour.
    assert np.ptp(chosen[:, 1:-1].mean(axis=0)) < 10 * (0.15 * 0.85 / DRAWS) ** 0.5
    assert abs(np.mean(chosen[:, 1:-2] & chosen[:, 2:-1]) - 0.15**2) < 5 * (0.15**2 / total) ** 0.5


def test_masks_depend_on_seed_and_position_alone() -> None:
    def masked(seed: int, positions: list[int], row: int) -> list[int]:
        ids = sequence_ids(len(positions))
        Masking(DataConfig(path=""), 4096, seed).apply(ids, lengths(len(positions)), np.array(positions))
        return ids[row].tolist()

    alone = masked(1, [2**40], 0)
    assert masked(1, [7, 2**40, 8], 1) == alone
    assert masked(1, [2**40 + 1], 0) != alone
    assert masked(2, [2**40], 0) != alone


def test_specials_and_what_lies_beyond_a_sequence_are_left_alone() -> None:
    ids = sequence_ids(500)
    sizes = np.arange(500) % 127
    chosen, labels = Masking(DataConfig(path="", mask_probability=0.9), 4096, 0).apply(ids, sizes, np.arange(500))
    assert not chosen[:, 0].any() and not chosen[np.arange(128) > sizes[:, None]].any()
    assert len(labels) == chosen.sum()
    assert chosen[1:127, 1:].any(axis=1).sum() > 100


def test_a_short_sequence_may_have_nothing_to_predict() -> None:
    chosen, _ = Masking(DataConfig(path=""), 4096, 0).apply(sequence_ids(50), lengths(50, 2), np.arange(50))
    assert 0 < chosen.any(axis=1).sum() < 50
