"""What computes a run's fused operations: refused before anything is changed, recorded where it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.cli import InputError
from pretrain.config import load_config
from tests.commands import pretrain, python


@pytest.mark.parametrize("ranks", [0, 2])
def test_one_that_cannot_run_here_is_refused_with_the_reason(tiny_config: list[str], tmp_path: Path, ranks: int) -> None:
    arguments = ["train", *tiny_config, f"run_dir={tmp_path / 'run'}", "kernels.geglu=triton"]
    done = pretrain(*arguments, ranks=ranks, status=1 if ranks else 2)
    assert "kernels.geglu=triton can't run here: it needs a GPU" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_unknown_one_is_refused_by_the_configuration() -> None:
    with pytest.raises(InputError, match=r"kernels\.geglu.*'triton'"):
        load_config("tiny", ["kernels.geglu=cuda"])
    with pytest.raises(InputError, match=r"kernels\.attention"):
        load_config("tiny", ["kernels.attention=apex"])  # apex has no attention


def test_a_checkpoint_says_what_computed(tiny_config: list[str], tmp_path: Path) -> None:
    done = pretrain("train", *tiny_config, f"run_dir={tmp_path / 'run'}", "train.stop_at_step=1")
    (manifest,) = (tmp_path / "run").glob("checkpoints/*/MANIFEST.json")
    recorded = json.loads(manifest.read_text())["state"]["implementations"]
    assert recorded["attention"] == recorded["layer_norm"] == "torch"
    assert "kernels: attention torch" in done.stderr


def test_what_one_rank_cannot_use_none_does() -> None:
    """Only the last rank found that Triton's LayerNorm fails, so only it tried apex: both take PyTorch's."""
    done = python("tests/pretrain/obstacle_worker.py", ranks=2)
    assert done.returncode == 0, done.stderr
    names = {"attention": "triton", "layer_norm": "torch", "geglu": "torch", "cross_entropy": "triton", "dropout": "triton"}
    for rank in (0, 1):
        assert f"rank {rank}: {names}" in done.stdout
    assert "rank 0: kernels.geglu=triton can't run here: another rank can't use it" in done.stdout
    assert "rank 1: kernels.geglu=triton can't run here: this GPU is old" in done.stdout
    assert "kernels: layer_norm: not triton: this GPU is old" in done.stderr
    assert "kernels: layer_norm: not apex: the ranks differ" in done.stderr
