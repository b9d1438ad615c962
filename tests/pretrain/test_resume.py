"""Where a run goes on: back to an earlier step, in a copied directory, after an import; and why it could not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import checkpoint
from pretrain.lives import read_lives
from tests.commands import ENVIRONMENT, ROOT, exit_status, losses, metrics, pretrain, python, result

WORKERS = Path(__file__).parent


@pytest.fixture(scope="module")
def finished(tiny_config: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on one rank, saved at 2, 4, 6 and 8; not to be changed."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    pretrain("train", *tiny_config, *SAVED_OFTEN, f"run_dir={run_dir}")
    return run_dir


def damage(run_dir: Path, step: int) -> Path:
    """Flip a bit of a step's file."""
    file = next(checkpoint.step_path(run_dir, step).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


SAVED_OFTEN = ["checkpoint.save_every=2", "checkpoint.keep_last=9"]


def test_going_back_sets_later_steps_aside_once_and_may_change_the_optimizer(
    tiny_config: list[str], finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    command = ["train", *tiny_config, *SAVED_OFTEN, f"run_dir={run_dir}", "--from-step", "4", "optimizer.learning_rate=1e-4"]
    back = pretrain(*command, "train.stop_at_step=6")
    assert f"resumed from {checkpoint.step_path(run_dir, 4)}" in back.stderr
    assert checkpoint.steps(run_dir) == [2, 4, 6]
    left = {path.name.partition(".left-")[0] for path in (run_dir / "checkpoints").glob("*.left-*")}
    assert left == {"step-000000006", "step-000000008"}
    assert losses(run_dir)[:4] == losses(finished)[:4] and losses(run_dir)[5] != losses(finished)[5]

    again = pretrain(*command)  # as a job that is queued again
    assert "has gone back to step 4 already" in again.stderr and f"{checkpoint.step_path(run_dir, 6)}" in again.stderr
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 9))
    assert [(life["from_step"], life["ranks"]) for life in read_lives(run_dir)] == [(0, 1), (4, 1), (6, 1)]

    unknown = pretrain(*command[:-3], "--from-step", "5", status=2)
    assert "no checkpoint of step 5 to go back to; there are: 2, 4, 6, 8" in unknown.stderr
    for back_again in ([], ["--from-step", "4"]):  # the second does not go back, so nothing may change either
        refused = pretrain(*command[:-3], *back_again, "optimizer.learning_rate=1e-3", status=2)
        assert "optimizer.learning_rate is 0.001, was 0.0001" in refused.stderr


def test_a_stable_phase_is_extended_before_its_decay_and_not_after(tiny_config: list[str], tmp_path: Path) -> None:
    def train(run_dir: str, *settings: str, status: int = 0) -> str:
        command = ["train", *tiny_config, *SAVED_OFTEN, f"run_dir={tmp_path / run_dir}", "optimizer.schedule=wsd", *settings]
        return pretrain(*command, status=status).stderr

    longer = "train.max_steps=10", "optimizer.decay_steps=2", "optimizer.final_learning_rate_ratio=0.1"
    train("long", *longer)
    train("extended", "optimizer.decay_steps=4")  # 8 steps, from the fifth on down
    refused = train("extended", *longer, status=2)
    assert "train.max_steps is 10, was 8" in refused and "--from-step with a step up to 4, where" in refused
    other = train("extended", "optimizer.decay_steps=4", "optimizer.warmup_steps=3", status=2)
    assert "optimizer.warmup_steps is 3, was 2" in other and "--from-step" not in other
    train("extended", *longer, "--from-step", "4")
    assert losses(tmp_path / "extended") == losses(tmp_path / "long")
    train("stopped", "optimizer.decay_steps=4", "train.stop_at_step=4")
    train("stopped", *longer)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "long")


def test_a_run_that_can_not_go_back_is_left_as_it_is(
    tiny_config: list[str], tiny_dataset: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "dataset"
    shutil.copytree(finished, run_dir)
    shutil.copytree(tiny_dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"seed": 99}))
    command = ["train", *tiny_config, *SAVED_OFTEN, f"run_dir={run_dir}", "--from-step", "4"]
    assert "manifest_sha256" in pretrain(*command, f"data.path={other}", status=2).stderr
    damage(run_dir, 4)
    damaged = pretrain(*command, status=2)
    assert "step 4 is damaged; nothing was changed. Other steps: 2, 6, 8" in damaged.stderr
    assert checkpoint.steps(run_dir) == [2, 4, 6, 8]
    assert (run_dir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_copied_run_directory_goes_on_where_it_lies(tiny_config: list[str], finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(checkpoint.step_path(copy, 8))
    pretrain("train", *tiny_config, *SAVED_OFTEN, f"run_dir={copy}")
    assert losses(copy) == losses(finished) and checkpoint.steps(copy) == [2, 4, 6, 8]


def test_inspect_tells_whole_steps_from_damaged_ones(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    file = damage(run_dir, 6)
    for name in ("step-000000009.tmp-life", "step-000000007.damaged-life"):  # being written, set aside
        (run_dir / "checkpoints" / name).mkdir()
    found = result(pretrain("inspect", run_dir, "--json"))
    assert [(row["step"], row["valid"]) for row in found["steps"]] == [(2, True), (4, True), (6, False), (8, True)]
    assert str(file) in found["steps"][2]["problem"] and found["set_aside"] == ["step-000000007.damaged-life"]
    first = found["steps"][0]
    assert (first["world_size"], first["zero_stage"], first["dtype"], first["position"]) == (1, 1, "fp32", 22)
    assert first["bytes"] == sum(path.stat().st_size for path in checkpoint.step_path(run_dir, 2).iterdir())
    assert found["lease"] is None
    quick = result(pretrain("inspect", run_dir, "--no-verify", "--json"))
    assert {row["valid"] for row in quick["steps"]} == {None}
    assert "not a run directory" in pretrain("inspect", tmp_path, status=2).stderr


def test_adams_step_count_of_an_imported_model_is_carried_on(tiny_config: list[str], finished: Path, tmp_path: Path) -> None:
    """As `import` makes it of a DeepSpeed checkpoint: step 0, with moments and the steps that Adam had taken."""
    source, run_dir = checkpoint.Checkpoint(checkpoint.step_path(finished, 8)), tmp_path / "run"
    shapes = {name: tuple(parameter["shape"]) for name, parameter in source.manifest["parameters"].items()}
    fragments = []
    for name, shape in shapes.items():
        numel = 1
        for size in shape:
            numel *= size
        fragments.append(checkpoint.Fragment(name, 0, {k: source.read(name, k, 0, numel) for k in checkpoint.KINDS}))
    state = {"imported": {"kind": "deepspeed"}, "optimizer_step": 8}
    checkpoint.save(
        run_dir, step=0, life="x", fragments=fragments, shapes=shapes, model=source.manifest["model"], state=state
    )
    shutil.copy(finished / "tokenizer.json", run_dir)
    pretrain("train", *tiny_config, *SAVED_OFTEN, f"run_dir={run_dir}", "train.stop_at_step=2")
    pretrain("train", *tiny_config, *SAVED_OFTEN, f"run_dir={run_dir}", "train.stop_at_step=4")
    after = checkpoint.Checkpoint(checkpoint.step_path(run_dir, 4)).state
    assert after["optimizer_step"] == 12 and after["imported"] == {"kind": "deepspeed"}


def test_ranks_that_miss_another_say_why_it_left(tiny_config: list[str], tmp_path: Path) -> None:
    done = python(WORKERS / "failing_worker.py", "at once", "train", *tiny_config, f"run_dir={tmp_path}", ranks=2)
    assert done.returncode == 1 and "MemoryError: no room for activations" in done.stderr
    left = json.loads((tmp_path / "exit.json").read_text())
    assert left["status"] == 1 and left["reason"] == "rank 1: no room for activations"


def test_ranks_that_never_come_together_end_with_70(tiny_config: list[str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "pretrain", "train", *tiny_config, f"run_dir={tmp_path}", "watchdog.start_seconds=5"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 70 and exit_status(tmp_path) == 70, done.stderr
    assert "the 2 ranks did not come together" in done.stderr


def test_a_save_under_way_is_finished_when_training_fails(tiny_config: list[str], tmp_path: Path) -> None:
    """Rank 1 fails in step 3, while the step saved before it is still being written, slowly."""
    settings = ["checkpoint.save_every=2", "checkpoint.keep_last=9", f"run_dir={tmp_path}"]
    done = python(WORKERS / "failing_worker.py", "slow", "train", *tiny_config, *settings, ranks=2)
    assert done.returncode == 1
    left = json.loads((tmp_path / "exit.json").read_text())
    assert checkpoint.steps(tmp_path) == [2] and left["checkpoint_step"] == 2 and left["status"] == 2


def test_a_save_is_compared_with_deepspeeds(tmp_path: Path) -> None:
    arguments = ["bench-checkpoint", "tiny", "--dir", tmp_path, "--rounds", "1", "--sequences", "1", "--json"]
    done = python("-m", "pretrain", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    found = result(done)
    assert found["ranks"] == 2 and found["stall_seconds"] > 0 and found["deepspeed_stall_seconds"] > 0
    assert found["gigabytes"] * 1e9 > 12 * found["parameters"] and not list(tmp_path.iterdir())
