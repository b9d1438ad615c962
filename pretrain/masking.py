"""Which tokens of a sequence are predicted and what the model sees in their place (BERT's 80/10/10).

The choice is a function of (seed, position in the order of training, token) alone: the same sequence is masked alike on any
rank, and anew in the next epoch, whose positions are others.

Overlapping k-mers are masked in spans of k tokens, as DNABERT does (Ji et al. 2021): each base stands in k of them, so that
one masked alone could be read off its neighbours. With k in a row masked exactly one base is hidden, which all k share; at
the ends of a sequence, where bases stand in fewer tokens, as many bases as tokens. DNABERT decides for each token by itself
whether it becomes [MASK], another, or stays; here a span has one fate, because a token that stays tells the base that the
others hide.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import SPECIALS
from kernels.random import PURPOSE_MASKS, fork, root_key, uniform
from pretrain.config import DataConfig

CLS, SEP, MASK = (SPECIALS.index(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
FIRST_CONTENT = len(SPECIALS)  # token ids below it are special


def span_tokens(tokenizer: dict[str, Any]) -> int:
    """Tokens that are masked in a row, by the manifest's entry `tokenizer`: k for overlapping k-mers, else 1."""
    return int(tokenizer.get("k") or 1) if tokenizer.get("kind") == "overlapping-kmer" else 1


class Masking:
    """Draws masks for content tokens."""

    def __init__(self, config: DataConfig, vocab_size: int, seed: int, span: int = 1) -> None:
        """`span`: tokens that are masked in a row."""
        self.config, self.content_ids, self.span = config, vocab_size - FIRST_CONTENT, span
        self._key = np.array([root_key(seed, PURPOSE_MASKS)])
        # A token is masked unless none of the `span` tokens that end with it begins a span: (1 - q)^span = 1 - p.
        p = config.mask_probability
        q = p if span == 1 else -math.expm1(math.log1p(-p) / span)
        # A word, read as a signed number, is below this with the probability that a span begins.
        self._threshold = round(q * 2.0**64) - 2**63

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
            content token is chosen with the same probability, spans independently of each other, so a short sequence may
            have none.
        """
        width, before = ids_bt.shape[1], self.span - 1
        # Word n is that of column n - before: spans may begin before a sequence and reach over its end, so that tokens at
        # its ends are masked as often as others.
        words = fork(fork(self._key, positions_b)[:, None], np.arange(width + before))
        begins = words < self._threshold
        chosen = begins[:, before:].copy()
        for earlier in range(before):
            chosen |= begins[:, earlier : earlier + width]
        chosen[:, 0] = False
        chosen &= np.arange(width) <= lengths_b[:, None]
        where = np.nonzero(chosen)
        rows, columns = where
        words_of_tokens = words[rows, columns + before]
        words_of_spans = words[rows, self._heads(begins)[rows, columns + before]] if before else words_of_tokens
        # The order of the words decided above; their lower halves are independent of it.
        fate = (words_of_spans & 0xFFFFFFFF) * 2.0**-32
        labels = ids_bt[where]
        seen = labels.copy()
        random = (fate >= self.config.replace_by_mask) & (fate < self.config.replace_by_mask + self.config.replace_by_random)
        seen[fate < self.config.replace_by_mask] = MASK
        seen[random] = FIRST_CONTENT + (uniform(fork(words_of_tokens[random], 0)) * self.content_ids).astype(np.int64)
        ids_bt[where] = seen
        return chosen, labels

    def _heads(self, begins: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Where the span begins that decides on each token: the first of spans that overlap, or one would tell of the other.

        `begins` and the result: [sequences, words].
        """
        inside = np.zeros_like(begins)  # a span that began earlier
        for distance in range(1, self.span):
            inside[:, distance:] |= begins[:, :-distance]
        heads = np.where(begins & ~inside, np.arange(begins.shape[1]), 0)
        return np.maximum.accumulate(heads, axis=1, out=heads)
