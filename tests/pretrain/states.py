"""What the checkpoints of a run hold."""

from pathlib import Path

import torch

from pretrain import checkpoint


def state_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every weight and moment of a step, flat, by kind and name, read from its files."""
    saved = checkpoint.Checkpoint(checkpoint.step_path(run_dir, step))
    saved.verify()
    return {
        f"{kind} {name}": saved.read(name, kind, 0, torch.Size(parameter["shape"]).numel())
        for name, parameter in saved.manifest["parameters"].items()
        for kind in checkpoint.KINDS
    }
