"""Whole runs in processes of their own: what a kill, other ranks and other ZeRO stages must not change."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pretrain import checkpoint
from tests.commands import ENVIRONMENT, ROOT, exit_status, losses, metrics, pretrain, python, result
from tests.pretrain.states import state_of

WORKERS = Path(__file__).parent


@pytest.fixture(scope="module")
def uninterrupted(tiny_config: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on two ranks at ZeRO 1; saved at 3, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = pretrain("train", *tiny_config, f"run_dir={run_dir}", "--json", ranks=2)
    assert result(done)["step"] == 8 and result(done)["ranks"] == 2
    return run_dir


def copy_at(step: int, run_dir: Path, target: Path) -> Path:
    """The run as it was right after `step` was saved."""
    shutil.copytree(run_dir, target)
    for saved in checkpoint.steps(target):
        if saved > step:
            shutil.rmtree(checkpoint.step_path(target, saved))
    return target


def test_a_run_learns_validates_and_leaves_its_record(uninterrupted: Path) -> None:
    records = metrics(uninterrupted)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["loss"] < records[0]["loss"]
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8]
    assert all(record["grad_norm"] > 0 for record in records)
    assert exit_status(uninterrupted) == 0
    assert checkpoint.steps(uninterrupted) == [6, 8]  # keep_last is 2
    assert any((uninterrupted / "tensorboard").iterdir())
    assert yaml.safe_load((uninterrupted / "config.yaml").read_text())["train"]["max_steps"] == 8


def test_other_ranks_and_stages_go_on_with_the_same_batches(
    tiny_config: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = copy_at(6, uninterrupted, tmp_path / "run")
    arguments = ["train", *tiny_config, f"run_dir={run_dir}"]
    pretrain(*arguments, "train.stop_at_step=7", "deepspeed.zero_stage=3", ranks=3)
    # What stage 3 read and wrote again must be what stage 1 had written, moved by one step.
    pretrain(*arguments, "deepspeed.zero_stage=2", ranks=1)
    for ours, theirs in zip(metrics(run_dir), metrics(uninterrupted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ("deepspeed.zero_stage=3", "train.activation_checkpointing=true", "train.recompute_geglu=true")),
        (1, ("train.compile=true", "train.recompute_geglu=true")),  # every rank compiles
        pytest.param(
            *(2, ("deepspeed.zero_stage=0", "train.onednn=true")),
            marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"),
        ),
    ],
    ids=["checkpointing", "compile", "onednn"],
)
def test_what_makes_a_step_cheaper_may_be_switched_on_in_the_middle_and_changes_nothing(
    tiny_config: list[str], uninterrupted: Path, tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    run_dir = copy_at(6, uninterrupted, tmp_path / "run")
    pretrain("train", *tiny_config, f"run_dir={run_dir}", *settings, ranks=ranks)
    state = checkpoint.Checkpoint(checkpoint.step_path(run_dir, 8)).state
    assert state["implementations"]["linear"] == ("onednn" if "train.onednn=true" in settings else "torch")
    for ours, theirs in zip(metrics(run_dir), metrics(uninterrupted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_ranks_and_any_stage_read_and_write_back_the_same_bits(
    tiny_config: list[str], tmp_path: Path, dtype: str
) -> None:
    """2 ranks at ZeRO 1 -> 1 rank at 3 -> 3 ranks at 2 -> 2 ranks at 1, by reading the files."""
    common = [*tiny_config, f"train.dtype={dtype}", "train.max_steps=4", "train.stop_at_step=2", "validation.every=0"]
    pretrain("train", *common, f"run_dir={tmp_path / '0'}", ranks=2)
    expected = state_of(tmp_path / "0", 2)
    for number, (ranks, stage) in enumerate([(1, 3), (3, 2), (2, 1)]):
        before, after = tmp_path / str(number), tmp_path / str(number + 1)
        arguments = [*common, f"run_dir={before}", f"deepspeed.zero_stage={stage}"]
        done = python("-m", "tests.pretrain.resave_worker", after, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        manifest = checkpoint.Checkpoint(checkpoint.step_path(after, 2)).manifest
        assert (manifest["world_size"], manifest["state"]["zero_stage"]) == (ranks, stage)
        found = state_of(after, 2)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_of_a_rank_shrinks_with_their_number(tiny_config: list[str], tmp_path: Path) -> None:
    """Ranks at ZeRO 3 that read a model from its files and save it: none builds, reads or writes the whole of it."""
    big = ["model.hidden_size=512", "model.intermediate_size=2048", "model.num_hidden_layers=8", "train.max_steps=2"]
    big += ["train.stop_at_step=0", "train.dtype=bf16", "deepspeed.zero_stage=3", f"run_dir={tmp_path / 'run'}"]
    peaks = []
    for ranks, out in [(1, tmp_path / "run"), (1, tmp_path / "one"), (3, tmp_path / "three")]:
        done = python("-m", "tests.pretrain.resave_worker", out, *tiny_config, *big, ranks=ranks)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    _, one, three = peaks  # a third, and what does not depend on the model: DeepSpeed's buckets, about 100 MB
    assert three["loaded"] < 0.6 * one["loaded"] and three["saved"] < 0.6 * one["saved"], peaks


def test_bf16_resumes_bit_for_bit_and_keeps_fp32_masters(tiny_config: list[str], tmp_path: Path) -> None:
    common = ["train", *tiny_config, "train.dtype=bf16", "deepspeed.zero_stage=2", "train.max_steps=4"]
    pretrain(*common, f"run_dir={tmp_path / 'whole'}")
    pretrain(*common, f"run_dir={tmp_path / 'parts'}", "train.stop_at_step=2")
    assert exit_status(tmp_path / "parts") == 0 and checkpoint.steps(tmp_path / "parts") == [2]
    pretrain(*common, f"run_dir={tmp_path / 'parts'}")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = state_of(tmp_path / "whole", 4)["weight bert.embeddings.word_embeddings.weight"]
    assert weights.dtype == torch.float32 and not torch.equal(weights, weights.bfloat16().float())


def test_gradients_of_a_global_batch_do_not_depend_on_the_ranks(tiny_config: list[str], tmp_path: Path) -> None:
    gradients = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.pt"
        # 11 rows: three ranks take 3, 4 and 4, so the first one ends with an empty micro batch.
        arguments = [*tiny_config, "train.micro_batch_size=3", f"run_dir={tmp_path / f'run{ranks}'}"]
        done = python(WORKERS / "gradient_worker.py", out, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        gradients.append(torch.load(out))
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            difference = (other[name] - expected).abs().max() / expected.abs().max()
            assert difference <= 1e-5, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_the_step_and_leaves_with_75(
    tiny_config: list[str], uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["-m", "pretrain", "train", *tiny_config, f"run_dir={run_dir}", "checkpoint.save_every=100000"]
    endless = subprocess.Popen(
        [sys.executable, *arguments, "train.max_steps=100000"], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").is_file() or len(metrics(run_dir)) < 2:
            assert endless.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(endless.pid, number)
        _, errors = endless.communicate(timeout=120)
    finally:
        endless.kill()
    assert endless.returncode == 75, errors
    left = json.loads((run_dir / "exit.json").read_text())
    assert left["status"] == 75 and left["checkpoint_step"] == metrics(run_dir)[-1]["step"]
    assert number.name in left["reason"]


def test_bad_input_ends_with_2_and_one_line(tiny_config: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    fresh, started = tmp_path / "fresh", copy_at(6, uninterrupted, tmp_path / "started")
    for run_dir, override, words in [
        (fresh, "train.max_step=3", "did you mean train.max_steps?"),
        (fresh, f"data.path={tmp_path}", f"{tmp_path / 'manifest.json'}: not found"),
        (fresh, "data.tokenizer=/no/such.json", "/no/such.json: No such file"),
        (fresh, "model.vocab_size=4096", "set model.vocab_size=512"),
        (started, "train.seed=9", "train.seed is 9, was 0"),
    ]:
        done = pretrain("train", *tiny_config, f"run_dir={run_dir}", override, status=2)
        assert words in done.stderr and "Traceback" not in done.stderr
        if "max_step=" not in override:  # without a configuration there is no run
            assert exit_status(run_dir) == 2
    assert [path.name for path in fresh.iterdir()] == ["exit.json"]


def test_a_run_that_never_saved_may_be_corrected(tiny_config: list[str], tmp_path: Path) -> None:
    explodes = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "optimizer.gradient_clipping=0"]
    arguments = ["train", *tiny_config, f"run_dir={tmp_path}", "train.max_steps=2", "checkpoint.save_every=1"]
    lost = pretrain(
        *arguments, *explodes, "train.max_steps=9", "checkpoint.save_every=2", "bad_steps.stop_after=3", status=1
    )
    assert "step 4: 3 bad steps in a row" in lost.stderr and "none is saved before them" in lost.stderr
    assert checkpoint.steps(tmp_path) == [] and exit_status(tmp_path) == 1
    pretrain(*arguments)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_run_with_no_whole_checkpoint_is_not_started_again(
    tiny_config: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = copy_at(8, uninterrupted, tmp_path / "run")
    for step in checkpoint.steps(run_dir):
        next(checkpoint.step_path(run_dir, step).glob("*.safetensors")).write_bytes(b"")
    before = (run_dir / "metrics.jsonl").read_bytes()
    python("-m", "pretrain", "train", *tiny_config, f"run_dir={run_dir}", ranks=2)
    assert exit_status(run_dir) == 2
    assert checkpoint.steps(run_dir) == [6, 8] and (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_block_that_one_rank_can_not_read_ends_all_ranks(
    tiny_config: list[str], tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    for tar in (dataset / "train").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[600] ^= 1  # in the first block
        tar.write_bytes(data)
    done = python("-m", "pretrain", "train", *tiny_config, f"data.path={dataset}", f"run_dir={tmp_path / 'run'}", ranks=2)
    assert done.returncode == 1 and "is damaged (crc32 differs)" in done.stderr
    assert exit_status(tmp_path / "run") == 2


def test_the_deepspeed_launcher_starts_it(tiny_config: list[str], tmp_path: Path) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={port}", "--module", "pretrain"]
    arguments = ["train", *tiny_config, f"run_dir={tmp_path}", "train.max_steps=1"]
    done = python("-m", "deepspeed.launcher.launch", *launcher, *arguments)
    assert done.returncode == 0, done.stderr
    assert checkpoint.Checkpoint(checkpoint.step_path(tmp_path, 1)).manifest["world_size"] == 2


def test_another_dataset_is_refused_on_resume(
    tiny_config: list[str], uninterrupted: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    other = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"seed": 99}))
    run_dir = copy_at(6, uninterrupted, tmp_path / "run")
    done = pretrain("train", *tiny_config, f"run_dir={run_dir}", f"data.path={other}", status=2)
    assert "manifest_sha256" in done.stderr
    assert exit_status(run_dir) == 2


def test_a_finished_run_is_left_as_it_is(tiny_config: list[str], uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = pretrain("train", *tiny_config, f"run_dir={uninterrupted}", "--json")
    assert result(done)["step"] == 8
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before and checkpoint.steps(uninterrupted) == [6, 8]
