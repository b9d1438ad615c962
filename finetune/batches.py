"""Rows of tokens to unpadded micro batches: order, dropout keys, and a bound on memory.

The order of training is a function of (seed, epoch), and a dropout key of (seed, position in that order, token), so
neither depends on how a batch is cut. A batch is cut where its padded size would pass a budget (attention pads on
the plain PyTorch path), which bounds memory without changing the effective batch, and on a CPU is faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.tokens import Tokens
from kernels.random import PURPOSE_DROPOUT, fork, root_key
from pretrain.model import Packed

PURPOSE_ORDER = 32  # of the seed's children, see kernels.random; fine-tuning has the numbers from 32
MICRO_BATCH_TOKENS = 16_384  # with padding
TOKENS_A_THREAD = 1_024  # on a CPU: with many more, what passes between two operations no longer fits its caches


def epoch_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The rows in the order in which this epoch takes them."""
    key = fork(np.array([root_key(seed, PURPOSE_ORDER)]), epoch)
    return np.argsort(fork(key, np.arange(rows)), kind="stable")


def micro_batches(lengths: NDArray[np.int64], budget: int | None = None) -> Iterator[NDArray[np.int64]]:
    """Indices of `lengths` in groups of similar length, each of at most `budget` padded tokens or of one sequence.

    The default is what suits the machine: as many as a GPU is busy with, or few for each of a CPU's threads.
    """
    if budget is None:
        threads = torch.get_num_threads()
        budget = MICRO_BATCH_TOKENS if torch.cuda.is_available() else min(MICRO_BATCH_TOKENS, TOKENS_A_THREAD * threads)
    order = np.argsort(lengths, kind="stable")
    first = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or (stop + 1 - first) * lengths[order[stop]] > budget:
            yield order[first:stop]
            first = stop


def pack(
    tokens: Tokens, rows: NDArray[np.int64], *, seed: int | None = None, positions: NDArray[np.int64] | None = None
) -> Packed:
    """Lay the sequences of `rows` end to end; with a seed and the rows' positions in training, with dropout keys."""
    lengths = tokens.starts[rows + 1] - tokens.starts[rows]
    cu_seqlens = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)  # [t] token number in its sequence
    ids = tokens.ids[np.repeat(tokens.starts[rows], lengths) + within]
    types = keys = None
    if tokens.seconds is not None:
        types = torch.from_numpy(within >= np.repeat(tokens.seconds[rows] - tokens.starts[rows], lengths)).long()
    if seed is not None and positions is not None:
        sequence_keys = fork(np.array([root_key(seed, PURPOSE_DROPOUT)]), positions)
        keys = torch.from_numpy(fork(np.repeat(sequence_keys, lengths), within))
    return Packed(torch.from_numpy(ids).long(), torch.from_numpy(cu_seqlens), int(lengths.max()), keys, types)
