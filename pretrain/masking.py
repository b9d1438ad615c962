"""Which tokens of a sequence are predicted and what the model sees in their place (BERT's 80/10/10).

The choice is a function of (seed, position in the order of training) alone: the same sequence is masked alike on any rank,
and anew in the next epoch, whose positions are others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import SPECIALS
from kernels.random import PURPOSE_MASKS, fork, root_key, uniform
from pretrain.config import DataConfig

CLS, SEP, MASK = (SPECIALS.index(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
FIRST_CONTENT = len(SPECIALS)  # token ids below it are special


class Masking:
    """Draws masks for content tokens (no specials among them)."""

    def __init__(self, config: DataConfig, vocab_size: int, seed: int) -> None:
        self.config, self.content_ids = config, vocab_size - FIRST_CONTENT
        self._key = root_key(seed, PURPOSE_MASKS)

    def apply(self, tokens: NDArray[np.int64], position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask one sequence.

        Args:
            tokens: int64 [n] content tokens.
            position: of the sequence in the order of training.

        Returns:
            (what the model sees: int64 [n], which tokens are predicted: int64 [masked] indices into `tokens`). Each token is
            chosen independently, so a short sequence may have none.
        """
        key = fork(np.array([self._key]), position)
        chosen, fate, other = (uniform(fork(fork(key, draw), np.arange(len(tokens)))) for draw in range(3))
        index = np.flatnonzero(chosen < self.config.mask_probability)
        seen = tokens.copy()
        by_mask = index[fate[index] < self.config.replace_by_mask]
        by_random = index[
            (fate[index] >= self.config.replace_by_mask)
            & (fate[index] < self.config.replace_by_mask + self.config.replace_by_random)
        ]
        seen[by_mask] = MASK
        seen[by_random] = FIRST_CONTENT + (other[by_random] * self.content_ids).astype(np.int64)
        return seen, index
