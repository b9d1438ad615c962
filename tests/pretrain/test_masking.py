import numpy as np

from pretrain.config import DataConfig
from pretrain.masking import FIRST_CONTENT, MASK, Masking

TOKENS = np.arange(FIRST_CONTENT, FIRST_CONTENT + 126)
DRAWS = 2000


def test_shares_are_15_percent_and_80_10_10() -> None:
    masking = Masking(DataConfig(path=""), vocab_size=4096, seed=3)
    chosen = masked = kept = 0
    random: list[int] = []
    for position in range(DRAWS):
        seen, index = masking.apply(TOKENS, position)
        untouched = np.ones(len(TOKENS), bool)
        untouched[index] = False
        assert (seen[untouched] == TOKENS[untouched]).all()
        chosen += len(index)
        masked += int((seen[index] == MASK).sum())
        kept += int((seen[index] == TOKENS[index]).sum())
        random += [int(s) for s, t in zip(seen[index], TOKENS[index], strict=True) if s not in (MASK, t)]
    # Five standard deviations of binomials of these sizes.
    assert abs(chosen / (DRAWS * len(TOKENS)) - 0.15) < 5 * (0.15 * 0.85 / (DRAWS * len(TOKENS))) ** 0.5
    for share, expected in ((masked, 0.8), (kept, 0.1), (len(random), 0.1)):
        assert abs(share / chosen - expected) < 5 * (expected * (1 - expected) / chosen) ** 0.5
    assert min(random) >= FIRST_CONTENT and max(random) > 4000


def test_masks_depend_on_seed_and_position_alone() -> None:
    masking = Masking(DataConfig(path=""), 4096, seed=1)
    seen, index = masking.apply(TOKENS, 2**40)
    again, index_again = Masking(DataConfig(path=""), 4096, seed=1).apply(TOKENS, 2**40)
    assert (seen == again).all() and (index == index_again).all()
    assert index.tolist() != masking.apply(TOKENS, 2**40 + 1)[1].tolist()
    assert index.tolist() != Masking(DataConfig(path=""), 4096, seed=2).apply(TOKENS, 2**40)[1].tolist()


def test_a_short_sequence_may_have_nothing_to_predict() -> None:
    masking = Masking(DataConfig(path=""), 4096, seed=0)
    assert any(len(masking.apply(TOKENS[:2], position)[1]) == 0 for position in range(10))
