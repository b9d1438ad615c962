"""Bits a base: how well hidden bases are predicted, in a unit that doesn't depend on the tokenizer.

A loss a token can't be compared between tokenizers: a token of six bases is harder to guess than one of two. Here it is

    sum of -log2 p(true token) / sum of the hidden bases of these tokens

over the predicted tokens in whose place the model sees [MASK]. Others of BERT's 80/10/10 are left out: a token that stays is
shown, and a random one doesn't even look as if something were missing. A base of a token is hidden unless a token of the
sequence that the model sees as it is covers it. With BPE and with k-mers side by side that is the whole token. Overlapping
k-mers cover a base k times; of k of them masked in a row each has one hidden base, the same one, and what else they cover
can be read off their neighbours.

What it is: a pseudo-likelihood. Each token is predicted by itself from what the model sees, even where its neighbours are
hidden with it. A model that takes all hidden bases for equally likely, and reads off the rest, has 2.0. More than that is
what it has yet to learn: which bases can be read off (overlapping k-mers begin at the bits of a whole token for one base),
how long a hidden token is (BPE), and the few tokens that are not of k bases.

What it isn't: the same question for every tokenizer.

* The longer a gap, the less its inner bases have to go by: for a perfect model six bases given what surrounds them are at
  least as many bits a base as one base given both of its neighbours. Masked overlapping k-mers hide single bases, and about
  a k-th of the bases that others hide at the same `data.mask_probability`: an easier question.
* A token with several hidden bases is one guess at all of them, so what they tell about each other counts. Overlapping
  k-mers guess a base several times, as if each were alone: it counts as often, and their agreeing would not make it better.
* BPE doesn't show how long a hidden token is: its length is guessed too. On the other hand the borders that are seen tell
  something about the text: what would have been merged across them doesn't stand there.
* It compares runs with equal masks (`data.mask_probability`, `replace_by_mask`) and the same validation regions only.

The unit is that of pseudo-perplexity (Salazar et al., "Masked Language Model Scoring", 2020) divided by bases instead of
tokens, with the masks of training instead of one at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.codec import Codec
from pretrain.loader import MaskedBatch
from pretrain.masking import FIRST_CONTENT, MASK


def hidden_bases(batch: MaskedBatch, codec: Codec) -> NDArray[np.int64]:
    """Bases of each predicted token that are hidden: int64 [m], 0 for a token that the model doesn't see as [MASK].

    Args:
        batch: on the CPU.
        codec: of the tokenizer that made its tokens.
    """
    seen_t, index_m, labels_m = batch.packed.ids_t.numpy(), batch.index_m.numpy(), batch.labels_m.numpy()
    masked_m = seen_t[index_m] == MASK
    if codec.overlap == 0:
        return np.where(masked_m, codec.token_bases[labels_m], 0)
    k = codec.overlap + 1
    true_t = seen_t.copy()
    true_t[index_m] = labels_m
    shown_t = (seen_t == true_t) & (seen_t >= FIRST_CONTENT)
    # Sequences are moved k apart: further than a token's bases reach.
    lengths_b = np.diff(batch.packed.cu_seqlens.numpy())
    place_t = np.arange(len(seen_t)) + k * np.repeat(np.arange(len(lengths_b)), lengths_b)
    end = len(seen_t) + k * len(lengths_b)
    left_t = np.maximum.accumulate(np.where(shown_t, place_t, -k))
    right_t = np.minimum.accumulate(np.where(shown_t, place_t, end)[::-1])[::-1]
    # The nearest token that is shown on the left covers all but as many bases as it is away, and so on the right.
    hidden_t = np.maximum(np.minimum(place_t - left_t, k) + np.minimum(right_t - place_t, k) - k, 0)
    return np.where(masked_m, hidden_t[index_m], 0)
