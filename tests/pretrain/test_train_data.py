"""Whole runs on data that is damaged, stuck, remote, weighted or another than before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.commands import ENVIRONMENT, ROOT, exit_status, losses, metrics, pretrain, python
from tests.data_prep.servers import file_server
from tests.pretrain.test_blocks import damage


@pytest.fixture
def copied(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A dataset that a test may damage."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))


def loader_state(run_dir: Path, step: int) -> dict[str, object]:
    state: dict[str, object] = checkpoint.Checkpoint(checkpoint.step_path(run_dir, step)).state["loader"]
    return state


def test_a_damaged_block_is_skipped_alike_on_any_ranks(tiny_config: list[str], copied: Path, tmp_path: Path) -> None:
    tar = damage(copied)
    arguments = ["train", *tiny_config, f"data.path={copied}", "data.on_damaged_block=skip"]
    for ranks in (1, 2):
        done = pretrain(*arguments, f"run_dir={tmp_path / str(ranks)}", ranks=ranks)
        assert f"skipped: {tar}: block 0 at offset 0 is damaged (crc32 differs)" in done.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    skipped = [record.get("skipped_sequences", 0) for record in one]
    assert sum(skipped) > 0 and max(skipped) <= 11
    assert skipped == [record.get("skipped_sequences", 0) for record in two]
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


@pytest.mark.parametrize("what", ["tar", "index"])
def test_a_file_that_hangs_ends_all_ranks_with_70_and_is_named(
    tiny_config: list[str], copied: Path, tmp_path: Path, what: str
) -> None:
    tars = sorted((copied / "train").glob("*.tar"))
    for tar in tars:
        file = tar if what == "tar" else tar.with_suffix(".index.npy")
        file.unlink()
        os.mkfifo(file)  # opening it waits for a writer
    arguments = [*tiny_config, f"data.path={copied}", f"run_dir={tmp_path / 'run'}", "data.stall_seconds=3"]
    done = python("-m", "pretrain", "train", *arguments, ranks=2)
    assert done.returncode == 1  # torchrun's for any failure
    assert exit_status(tmp_path / "run") == 70
    assert any(f"no data for 3 s (data.stall_seconds): reading block 0 of {tar}" in done.stderr for tar in tars)


def test_a_stop_signal_is_heeded_while_no_data_comes(tiny_config: list[str], copied: Path, tmp_path: Path) -> None:
    for tar in (copied / "train").glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)
    run_dir = tmp_path / "run"
    arguments = ["-m", "pretrain", "train", *tiny_config, f"data.path={copied}", f"run_dir={run_dir}"]
    waiting = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").is_file():
            assert waiting.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        waiting.terminate()
        _, errors = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 75, errors
    assert exit_status(run_dir) == 75 and checkpoint.steps(run_dir) == [0]


def test_another_dataset_and_seed_go_on_with_a_new_epoch_once(tiny_config: list[str], copied: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    common = ["train", *tiny_config, f"run_dir={run_dir}", "validation.every=0"]
    pretrain(*common, "train.stop_at_step=3")
    assert loader_state(run_dir, 3)["position"] == 33
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"seed": 99}))
    other = [*common, f"data.path={copied}", "train.seed=5", "data.sampling.temperature=2"]
    refused = pretrain(*other, status=2)
    assert "data.sampling.temperature is 2.0, was 1.0" in refused.stderr and "train.seed is 5, was 0" in refused.stderr
    assert "or data.start_new_epoch=true" in refused.stderr

    begun = pretrain(*other, "data.start_new_epoch=true", "train.stop_at_step=6")
    assert "going on with the beginning of epoch 1" in begun.stderr
    state = loader_state(run_dir, 6)
    assert state["seed"] == 5
    start = int(str(state["position"])) - 33
    assert start > 400  # the tiny dataset's epoch, but for fewer sequences than there are streams
    # Running it again, as a requeued job does, goes on where it was.
    pretrain(*other, "data.start_new_epoch=true")
    assert loader_state(run_dir, 8)["position"] == start + 55
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 9))


def test_a_dataset_at_a_url_trains_as_the_same_one_on_disk(
    tiny_config: list[str], tiny_dataset: Path, tmp_path: Path
) -> None:
    common = ["train", *tiny_config, "train.max_steps=3"]
    pretrain(*common, f"run_dir={tmp_path / 'disk'}")
    with file_server(tiny_dataset) as server:
        server.faults = iter([None, "drop", 500, *[None] * 8, "wrong"])  # in passing: what fails is tried again
        url = server.url.replace("//", "//me:secret@") + "?signature=secret"
        remote = [f"data.path={url}", f"data.cache_dir={tmp_path / 'cache'}"]
        done = pretrain(*common, *remote, f"run_dir={tmp_path / 'url'}", ranks=2)
    assert "try 2 of 5" in done.stderr and "secret" not in done.stderr
    assert not any("secret" in path.read_text() for path in (tmp_path / "url").glob("*.*"))
    assert losses(tmp_path / "url") == pytest.approx(losses(tmp_path / "disk"), rel=1e-5)
    assert loader_state(tmp_path / "url", 3) == loader_state(tmp_path / "disk", 3)
    assert any((tmp_path / "cache" / "blocks").rglob("*-*"))
