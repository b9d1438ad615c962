"""Bytes of weights, gradients, optimizer state and buffers that a rank holds under each ZeRO stage.

The sizes are those of the tensors that DeepSpeed 0.19 allocates, padding included (`runtime/zero/stage_1_and_2.py`,
`runtime/zero/stage3.py`, `runtime/engine.py`); tests compare them with an engine's tensors and with the allocator's count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pretrain.engine import BUCKET_ELEMENTS, DTYPES
from pretrain.model import MaskedLanguageModel, ModelConfig

ALIGNMENT = 2  # elements a rank, `nccl_start_alignment_factor`
PERSISTENT_ELEMENTS = 100_000  # stage 3: parameters up to this size stay whole on every rank
LIVE_ELEMENTS = 1_000_000_000  # stage 3: as much stays gathered because it is soon used again; also updated at once
PREFETCH_ELEMENTS = 50_000_000  # stage 3: gathered at once, and for a moment twice
ALLREDUCE_ELEMENTS = 500_000_000  # stage 0: gradients that are copied and summed at once
LAMB_COPIES = 5  # fp32 tensors of pretrain.lamb for each tensor that it updates, at most at a time


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each distinct parameter by its name, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in MaskedLanguageModel(config).named_parameters()}


def parameter_groups(shapes: Iterable[tuple[int, ...]], decay_norms_and_biases: bool) -> list[list[int]]:
    """Elements of each parameter, in the groups that `pretrain.optimizer` makes of them."""
    groups: list[list[int]] = [[], []]
    for shape in shapes:
        groups[not decay_norms_and_biases and len(shape) == 1].append(math.prod(shape))
    return [group for group in groups if group]


@dataclass(frozen=True)
class State:
    """Bytes on the rank that holds most. The first six are exact, the others come and go: estimates, rather high."""

    weights: int  # that the model computes with
    small_weights: int  # stage 3: whole copies of small parameters
    master_weights: int  # fp32, which the optimizer changes; at stage 0 they are the weights themselves
    moments: int  # fp32, two a parameter
    gradients: int  # from the first micro batch of a step to its update
    bucket: int  # in which gradients wait until they are summed over the ranks
    summing: int  # copies of gradients, while they are summed
    gathered: int  # stage 3: weights of other ranks
    fresh: int  # the largest parameter's gradient, just computed
    update: int  # gradients and their copies in the optimizer's step
    sums_in_every_backward: bool  # stages 2 and 3; below them after the last micro batch, when no activations are left

    @property
    def lasting(self) -> int:
        """Allocated for the whole run."""
        return self.weights + self.small_weights + self.master_weights + self.moments

    def peak(self, activations: int, accumulation: int) -> int:
        """Bytes at most, in a step of `accumulation` micro batches whose backward passes need `activations` bytes."""
        held = self.gradients + self.bucket
        # The word embeddings' gradient from the decoder waits for the other; in the end both and their sum are there.
        activations = max(activations + self.fresh, 3 * self.fresh)
        if self.sums_in_every_backward:
            busy = held + self.summing + self.gathered + activations
        elif accumulation > 1:
            busy = held + max(self.summing, activations)
        else:  # gradients grow as activations shrink
            busy = self.bucket + max(self.gradients + self.summing, activations)
        return self.lasting + max(busy, self.update)


def state(
    groups: Sequence[Sequence[int]], stage: int, ranks: int, dtype: str, accumulation: int, lamb: bool = False
) -> State:
    """What a rank holds.

    Args:
        groups: elements of each parameter, in the model's order, in the optimizer's groups.
        stage: ZeRO stage, 0 only with fp32.
        dtype: of the forward passes, `bf16` or `fp32`; DeepSpeed sums gradients in the same.
        accumulation: micro batches a step.
        lamb: whether the optimizer is ours, which needs temporary tensors, rather than a fused AdamW.
    """
    item, sizes = DTYPES[dtype].itemsize, [size for group in groups for size in group]
    total, largest = sum(sizes), max(sizes)
    to_fp32 = 4 if dtype != "fp32" else 0  # bytes of a copy of an element in fp32, where it is one
    updating = item + to_fp32 + (4 * LAMB_COPIES if lamb else 0)  # bytes an element that is updated
    bucket = item * BUCKET_ELEMENTS
    waiting = item * min(total, max(BUCKET_ELEMENTS, largest))
    if stage == 0:
        return State(
            weights=item * total,
            small_weights=0,
            master_weights=0,
            moments=8 * total,
            gradients=item * total,
            bucket=0,
            summing=item * min(total, ALLREDUCE_ELEMENTS) if ranks > 1 else 0,
            gathered=0,
            fresh=item * largest,
            update=item * total + (4 * LAMB_COPIES * total if lamb else 0),
            sums_in_every_backward=False,
        )
    if stage == 3:
        part = sum(-(-size // ranks) for size in sizes)
        # Gathered, so padded; on one rank there is nothing to gather.
        small = sum(-(-size // ranks) * ranks for size in sizes if size <= PERSISTENT_ELEMENTS) if ranks > 1 else 0
        others = total - small if ranks > 1 else 0
        at_once = min(others, max(PREFETCH_ELEMENTS, largest))
        return State(
            weights=item * part,
            small_weights=item * small,
            master_weights=4 * part,
            moments=8 * part,
            gradients=item * part,
            bucket=bucket,
            summing=waiting,
            gathered=item * (min(others, LIVE_ELEMENTS + largest) + at_once),
            fresh=item * largest,
            update=item * part + bucket + updating * min(part, LIVE_ELEMENTS),
            sums_in_every_backward=True,
        )
    align = ALIGNMENT * ranks
    parts = [-(-sum(group) // align) * align // ranks for group in groups]
    # Of the rank with most in each group: another rank for each, so two groups' sum is an upper bound.
    owned = item * sum(_largest_share(group, part, ranks) for group, part in zip(groups, parts, strict=True))
    return State(
        weights=item * ranks * sum(parts),
        small_weights=0,
        master_weights=4 * sum(parts),
        moments=8 * sum(parts),
        gradients=item * total if stage == 1 else owned,
        bucket=bucket,
        # The gradients of a partition get memory of their own; at stage 2 beside the sum of earlier micro batches.
        summing=waiting + (owned if stage == 1 or accumulation > 1 else 0),
        gathered=0,
        fresh=item * largest,
        update=owned + updating * max(parts),
        sums_in_every_backward=stage == 2,
    )


def _largest_share(sizes: Sequence[int], part: int, ranks: int) -> int:
    """Elements of the parameters, each whole, that have some in a partition of `part` elements; of the one with most."""
    shares, start = [0] * ranks, 0
    for size in sizes:
        for rank in range(start // part, (start + size - 1) // part + 1):
            shares[rank] += size
        start += size
    return max(shares)
