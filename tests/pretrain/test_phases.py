"""From one phase of pre-training to the next: `import` of a run, and training on from there on longer sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kernels
from data_prep.__main__ import run as data_prep
from data_prep.cli import InputError
from pretrain import checkpoint
from pretrain.config import load_config
from pretrain.hf import export_run, import_directory
from pretrain.loader import Loader, open_dataset
from pretrain.pretrained import load_pretrained
from tests.commands import losses, pretrain, result
from tests.kernels.test_attention import make, naive
from tests.pretrain.states import state_of


def state(run_dir: Path, step: int) -> dict[str, Any]:
    return checkpoint.Checkpoint(checkpoint.step_path(run_dir, step)).state


@pytest.fixture(scope="module")
def first_phase(tiny_config: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on sequences of 128 tokens, saved at 3, 6 and 8; not to be changed."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    pretrain("train", *tiny_config, "checkpoint.keep_last=9", f"run_dir={run_dir}")
    return run_dir


@pytest.fixture(scope="module")
def long_dataset(synthetic: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dataset` with sequences of 512 tokens."""
    path = tmp_path_factory.mktemp("long") / "dataset"
    arguments = ["shard", "--genomes", synthetic / "genomes", "--tokenizer", tiny_tokenizer, "--out", path]
    arguments += ["--region-bases", "5000", "--valid-fraction", "0.1", "--streams", "8", "--sequence-length", "512"]
    assert data_prep([str(argument) for argument in arguments]) == 0
    return path


def test_a_run_is_imported_with_its_moments(first_phase: Path, tmp_path: Path) -> None:
    for step, chosen in ((8, None), (3, 3)):
        out = tmp_path / str(step)
        told = import_directory(first_phase, out, step=chosen)
        assert (told["step"], told["from_step"], told["optimizer_step"], told["kind"]) == (0, step, step, "run")
        old, new = state_of(first_phase, step), state_of(out, 0)
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
        assert (out / "tokenizer.json").read_bytes() == (first_phase / "tokenizer.json").read_bytes()
        about = state(out, 0)
        assert about.keys() == {"optimizer_step", "imported"}  # no position, no bad steps
        sha256 = state(first_phase, step)["loader"]["manifest_sha256"]
        source = {"kind": "run", "path": str(first_phase), "step": step, "dataset_manifest_sha256": sha256}
        assert about["imported"] == source


def test_the_moments_can_be_left_behind(first_phase: Path, tmp_path: Path) -> None:
    assert "optimizer_step" not in import_directory(first_phase, tmp_path / "run", fresh_optimizer=True)
    assert not checkpoint.Checkpoint(checkpoint.step_path(tmp_path / "run", 0)).has_optimizer_state
    assert "optimizer_step" not in state(tmp_path / "run", 0)
    weights = load_pretrained(first_phase).weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_pretrained(tmp_path / "run").weights.items())


def test_a_next_phase_goes_on_with_sequences_of_512(
    tiny_config: list[str], first_phase: Path, long_dataset: Path, tmp_path: Path
) -> None:
    overrides = [*tiny_config[1:], f"data.path={long_dataset}", "train.max_steps=4", "deepspeed.zero_stage=2"]
    preset = tmp_path / "phase.yaml"
    preset.write_text("preset: tiny\noptimizer: {learning_rate: 1.0e-3}\n")
    longest = Loader(*open_dataset(load_config("tiny", overrides)), 0, 1).step(0)[0].packed.max_seqlen
    assert longest == 512
    second = tmp_path / "second"
    told = result(pretrain("import", first_phase, "--out", second, "--json"))
    assert (told["step"], told["from_step"]) == (0, 8)
    pretrain("train", preset, *overrides, f"run_dir={second}", ranks=2)
    assert len(losses(second)) == 4 and losses(second)[0] < losses(first_phase)[0]
    assert state(second, 4)["optimizer_step"] == 12 and state(second, 4)["imported"]["step"] == 8
    assert state(second, 4)["loader"]["position"] == 4 * 11  # of the new dataset, from its beginning
    written = yaml.safe_load((second / "config.yaml").read_text())
    assert "preset" not in written and written["optimizer"]["learning_rate"] == 1e-3
    export_run(second, tmp_path / "hf")
    assert ", started from step 8 of another run." in (tmp_path / "hf" / "README.md").read_text()
    # And a third phase knows both that came before.
    told = import_directory(second, tmp_path / "third")
    assert (told["optimizer_step"], told["from_step"], told["imported"]["step"]) == (12, 4, 8)


def test_attention_reaches_further_than_in_the_first_phase() -> None:
    lengths = [512, 130]
    qkv, cu_seqlens, longest = make(lengths)
    out = kernels.attention(qkv, cu_seqlens, longest)
    assert (out - naive(qkv, lengths, kernels.alibi_slopes(3))).abs().max() <= 1e-12


def test_what_has_no_moments_is_imported_without_and_said(
    run_dir: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_directory(exported, tmp_path / "once")
    told = import_directory(tmp_path / "once", tmp_path / "twice")
    assert told["imported"]["kind"] == "huggingface" and "optimizer_step" not in told
    assert "has no Adam moments" in capsys.readouterr().err
    export_run(tmp_path / "twice", tmp_path / "hf")
    origin = "started from step 0 of another run, started from Hugging Face files."
    assert origin in (tmp_path / "hf" / "README.md").read_text()


def test_what_cant_be_imported_is_named(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint of step 7; there are: 100, 200"):
        import_directory(run_dir, tmp_path / "out", step=7)
    with pytest.raises(InputError, match=r"not a run directory .*; leave out --step"):
        import_directory(exported, tmp_path / "out", step=7)
    with pytest.raises(InputError, match="a run directory, which has its architecture; leave out --like"):
        import_directory(run_dir, tmp_path / "out", like=exported)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="has no checkpoint that is whole"):
        import_directory(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
