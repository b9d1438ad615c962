"""Which tokens of a sequence are predicted and what the model sees in their place (BERT's 80/10/10).

The choice is a function of (seed, position in the order of training, token) alone: the same sequence is masked alike on any
rank, and anew in the next epoch, whose positions are others.
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
    """Draws masks for content tokens."""

    def __init__(self, config: DataConfig, vocab_size: int, seed: int) -> None:
        self.config, self.content_ids = config, vocab_size - FIRST_CONTENT
        self._key = np.array([root_key(seed, PURPOSE_MASKS)])
        # A word, read as a signed number, is below this with the probability that a token is predicted.
        self._threshold = round(config.mask_probability * 2.0**64) - 2**63

    def apply(
        self, ids_bt: NDArray[np.int64], lengths_b: NDArray[np.int64], positions_b: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Mask sequences in place.

        Args:
            ids_bt: int64 [sequences, width]; token t of a sequence stands in column t + 1, after [CLS]. Changed in place.
            lengths_b: int64 [sequences], content tokens of each.
            positions_b: int64 [sequences], of each in the order of training.

        Returns:
            (which tokens are predicted: bool [sequences, width]; what they were: int64 [predicted], row by row). Each
            content token is chosen independently, so a short sequence may have none.
        """
        width = ids_bt.shape[1]
        words = fork(fork(self._key, positions_b)[:, None], np.arange(width))
        chosen = words < self._threshold
        chosen[:, 0] = False
        chosen &= np.arange(width) <= lengths_b[:, None]
        where = np.nonzero(chosen)
        words = words[where]
        # The order of the words decided above; their lower halves are independent of it.
        fate = (words & 0xFFFFFFFF) * 2.0**-32
        labels = ids_bt[where]
        seen = labels.copy()
        random = (fate >= self.config.replace_by_mask) & (fate < self.config.replace_by_mask + self.config.replace_by_random)
        seen[fate < self.config.replace_by_mask] = MASK
        seen[random] = FIRST_CONTENT + (uniform(fork(words[random], 0)) * self.content_ids).astype(np.int64)
        ids_bt[where] = seen
        return chosen, labels
