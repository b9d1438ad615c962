"""What changes from step to step by plan: the learning rate and the size of the global batch.

Steps count from 0, and everything here is a function of the step alone, so that a resumed run needs no state of it.
"""

from __future__ import annotations

import math

from pretrain.config import OptimizerConfig, TrainConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear from 0 to the peak over the warm-up, then down until `max_steps`, where the run ends.

    The first update has the rate of step 1, so that it is not wasted, and the last one is above the final rate.

    linear: to 0 (the paper's schedule).
    cosine: by half a cosine, to `final_learning_rate_ratio` of the peak (Loshchilov and Hutter, 2017, equation 5).
    wsd: at the peak until `decay_steps` before the end, then to that share of it by 1 - sqrt(x), x being the share of the
        decay that is over (Hägele et al., 2024, arXiv 2405.18392, section 3).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left, whole = max_steps - step, max(1, max_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * left / whole
    if config.schedule == "cosine":
        above = (1 + math.cos(math.pi * (1 - left / whole))) / 2
    else:
        above = 1 - math.sqrt(max(0.0, 1 - left / config.decay_steps))
    final = config.final_learning_rate_ratio
    return config.learning_rate * (final + (1 - final) * above)


def batch_size(config: TrainConfig, step: int) -> int:
    """Sequences of the global batch of a step: `global_batch_size`, or on the way there (`train.batch_warmup`)."""
    warmup, full = config.batch_warmup, config.global_batch_size
    if warmup is None or step >= warmup.steps:
        return full
    return warmup.start + (full - warmup.start) * step // warmup.steps
