"""Whether a step fits into a GPU's memory, and what would where it doesn't."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pretrain.config import Config
from pretrain.order import micro_batches
from pretrain.plan_activations import Activations, Kept, activations
from pretrain.plan_state import State, parameter_groups, parameter_shapes, state

# Of a GPU's memory, for torch's tensors; the rest is for CUDA's context, NCCL's buffers and gaps. An assumption.
USABLE_SHARE = 0.92
MOST_NODES = 1024


@dataclass(frozen=True)
class Way:
    """What can be changed without changing what the run computes."""

    stage: int
    micro_batch: int
    checkpointing: bool
    nodes: int

    def words(self, now: Way) -> str:
        """The keys and flags in which this differs from `now`."""
        changes = [
            ("deepspeed.zero_stage={}", self.stage, now.stage),
            ("train.micro_batch_size={}", self.micro_batch, now.micro_batch),
            ("train.activation_checkpointing={}", str(self.checkpointing).lower(), str(now.checkpointing).lower()),
            ("--nodes {}", self.nodes, now.nodes),
        ]
        return " ".join(words.format(value) for words, value, before in changes if value != before)


@dataclass(frozen=True)
class Need:
    """Of one rank: the most sequences that it takes at once, its micro batches a step, and bytes."""

    sequences: int
    accumulation: int
    state: State
    activations: Activations

    @property
    def peak(self) -> int:
        return self.state.peak(self.activations.peak, self.accumulation)


class Memory:
    """Bytes that a run needs on a GPU, in the way of its configuration and in others.

    Args:
        config: resolved by its dataset where there is one.
        kernels: who computes each operation, `triton` or another name.
        length: tokens of a sequence.
        gpus_per_node: ranks of a node.
        usable: bytes of a GPU's memory that torch can use.
    """

    def __init__(self, config: Config, kernels: dict[str, str], length: int, gpus_per_node: int, usable: float) -> None:
        self.config, self.kernels, self.length = config, kernels, length
        self.gpus_per_node, self.usable = gpus_per_node, usable
        self.groups = parameter_groups(parameter_shapes(config.model).values(), config.optimizer.decay_norms_and_biases)

    def need(self, way: Way) -> Need:
        """What the rank with most needs."""
        train, ranks = self.config.train, way.nodes * self.gpus_per_node
        sequences = min(way.micro_batch, -(-train.global_batch_size // ranks))
        accumulation = micro_batches(train.global_batch_size, ranks, way.micro_batch)
        lamb = self.config.optimizer.name == "lamb"
        return Need(
            sequences,
            accumulation,
            state(self.groups, way.stage, ranks, train.dtype, accumulation, lamb),
            activations(
                self.config.model,
                train.dtype,
                Kept(self.kernels, way.checkpointing, train.recompute_geglu),
                sequences=sequences,
                length=self.length,
                masked=sequences * (self.length - 2) * self.config.data.mask_probability,
            ),
        )

    def fits(self, way: Way) -> bool:
        return self.need(way).peak <= self.usable

    def stages(self) -> list[int]:
        """That the run's dtype can have."""
        return [0, 1, 2, 3] if self.config.train.dtype == "fp32" else [1, 2, 3]

    def ways_out(self, now: Way) -> list[Way]:
        """What would fit, each with as few changes as possible; empty where nothing would."""
        single = [*self._one_change(now)]
        if single:
            return single
        nodes = now.nodes
        while nodes <= MOST_NODES:
            for checkpointing in sorted({now.checkpointing, True}):
                for stage in self.stages():
                    way = self._largest_micro_batch(replace(now, stage=stage, checkpointing=checkpointing, nodes=nodes))
                    if way is not None:
                        return [way]
            nodes *= 2
        return []

    def _one_change(self, now: Way) -> Iterator[Way]:
        stages = (replace(now, stage=stage) for stage in self.stages() if stage > now.stage)
        yield from [way for way in stages if self.fits(way)][:1]
        smaller = self._largest_micro_batch(now)
        if smaller is not None:
            yield smaller
        checkpointing = replace(now, checkpointing=True)
        if self.fits(checkpointing):
            yield checkpointing
        nodes = now.nodes * 2
        while nodes <= MOST_NODES:
            if self.fits(replace(now, nodes=nodes)):
                # Doubling has passed over smaller ones.
                yield next(way for n in range(nodes // 2 + 1, nodes + 1) if self.fits(way := replace(now, nodes=n)))
                return
            nodes *= 2

    def _largest_micro_batch(self, way: Way) -> Way | None:
        """With the largest micro batch up to its own that fits, or None."""
        fitting, over = 0, way.micro_batch + 1
        while over - fitting > 1:
            middle = (fitting + over) // 2
            if self.fits(replace(way, micro_batch=middle)):
                fitting = middle
            else:
                over = middle
        return replace(way, micro_batch=fitting) if fitting else None
