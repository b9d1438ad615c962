import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import Metrics, memory_gb, read_metrics


def record(step: int, **values: Any) -> dict[str, Any]:
    usual = {"loss": 1 / 3, "masked_accuracy": 0.1, "grad_norm": 2.0, "tokens_per_second": 1e6, "data_wait_seconds": 0.0}
    return {"step": step, **usual, **values}


def write(run_dir: Path, *records: dict[str, Any], restored_step: int = 0) -> None:
    metrics = Metrics(run_dir, restored_step, 100)
    for values in records:
        metrics.write(values)
    metrics.close()


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return values


def test_what_is_not_finite_is_null_in_the_file_and_no_point_in_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, record(1), record(2, loss=math.nan, grad_norm=math.inf), record(3, loss=None))
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == record(1)  # to the last digit
    assert [line["loss"] for line in lines] == [1 / 3, None, None]
    assert [line["grad_norm"] for line in lines] == [2.0, None, 2.0]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1]
    assert [event.step for event in board.Scalars("grad_norm")] == [1, 3]
    assert [event.step for event in board.Scalars("masked_accuracy")] == [1, 2, 3]


def test_the_console_shows_what_is_out_of_the_ordinary(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, record(1, checkpoint_stall_seconds=0.05, slowest_rank=0, slowest_rank_ratio=1.1, skipped_steps=0))
    assert capfd.readouterr().err == "step 1/100  loss 0.3333  accuracy 0.100  norm 2  1,000,000 tokens/s\n"
    unusual = {"checkpoint_stall_seconds": 2.25, "slowest_rank": 3.0, "slowest_rank_ratio": 1.64, "skipped_steps": 2.0}
    write(tmp_path, record(1, loss=None, mfu=0.412, **unusual))
    line = capfd.readouterr().err
    assert "loss nan" in line and "mfu 41.2%" in line
    assert "waited 2.2 s for a checkpoint  rank 3 takes 1.6x the median  2 steps skipped" in line


def test_a_resumed_run_cuts_back_and_drops_an_unfinished_line(tmp_path: Path) -> None:
    write(tmp_path, record(1), record(2), record(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    write(tmp_path, record(3, loss=0.5), restored_step=2)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1 / 3), (2, 1 / 3), (3, 0.5)]


@pytest.mark.parametrize("damage", [b"\0" * 50, b"\xff\xfe{", b"7", b"{}", b'{"step": null}', b'"loss": 0.5}'])
def test_a_damaged_line_is_left_out_and_what_follows_is_kept(
    tmp_path: Path, damage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, record(1), record(2), record(3))
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((first, damage, third, b"")))
    write(tmp_path, record(4), restored_step=3)
    assert f"{path}: line 2 is damaged" in capfd.readouterr().err
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]


def test_memory_is_this_process_s_peak_in_gb() -> None:
    ballast = torch.ones(50_000_000)  # 0.2 GB
    assert 0.2 < memory_gb(torch.device("cpu")) < 100
    assert ballast[0] == 1
