"""What a run will need, known before it starts."""

from __future__ import annotations

from pretrain.checkpoint import KINDS
from pretrain.config import Config
from pretrain.model import parameter_count
from pretrain.saver import MARGIN_BYTES


def steps_on_disk(config: Config) -> int:
    """The most checkpoints that a run has on its disk at once.

    `keep_last`, one for each multiple of `keep_every`, and the one being written: what it pushes out goes only when it is
    whole. Never more than the run saves.
    """
    settings, last = config.checkpoint, config.train.max_steps
    saves = -(-last // settings.save_every)
    for_good = last // settings.keep_every if settings.keep_every else 0
    return min(saves, settings.keep_last + for_good + 1)


def disk_bytes(config: Config) -> int:
    """Bytes that a run needs in its run_dir from its first step to its last.

    12 a parameter (fp32 weight and two moments) for each of `steps_on_disk`, and a margin for logs and metrics. Takes
    `model.vocab_size` from the configuration: resolve that by its dataset first (`pretrain.loader.open_dataset`).
    """
    return 4 * len(KINDS) * parameter_count(config.model) * steps_on_disk(config) + MARGIN_BYTES
