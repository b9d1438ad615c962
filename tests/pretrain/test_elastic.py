"""Data, masks and dropout of every global batch while a run is killed and goes on with other numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import python

STEPS = 12
WORKER = Path(__file__).parent / "recording_worker.py"


def recorded(directory: Path) -> dict[int, list[Any]]:
    """Step -> the lines of all ranks in the order of positions."""
    steps: dict[int, list[Any]] = {}
    for path in directory.glob("*.json"):
        steps.setdefault(int(path.stem.split("-")[0]), []).extend(json.loads(path.read_text()))
    return {step: sorted(lines) for step, lines in sorted(steps.items())}


@pytest.mark.drill
def test_kills_and_other_ranks_neither_repeat_nor_skip_nor_mask_otherwise(tiny_config: list[str], tmp_path: Path) -> None:
    common = [*tiny_config, f"train.max_steps={STEPS}", "validation.every=0"]
    whole, lives = tmp_path / "whole", []
    whole.mkdir()
    done = python(WORKER, whole, "0", *common, f"run_dir={tmp_path / 'whole-run'}", ranks=2)
    assert done.returncode == 0, done.stderr

    # Saved every 3 steps: a life that is killed in step 5 goes on with step 4.
    for number, (ranks, kill_step) in enumerate([(2, 5), (1, 7), (3, 10), (2, 0)]):
        life = tmp_path / f"life-{number}"
        life.mkdir()
        done = python(WORKER, life, str(kill_step), *common, f"run_dir={tmp_path / 'run'}", ranks=ranks)
        assert (done.returncode == 0) == (kill_step == 0), done.stderr
        lives.append(recorded(life))

    assert [list(life) for life in lives] == [[1, 2, 3, 4, 5], [4, 5, 6, 7], [7, 8, 9, 10], [10, 11, 12]]
    expected = recorded(whole)
    assert list(expected) == list(range(1, STEPS + 1))
    for life in lives:
        for step, lines in life.items():
            assert lines == expected[step], f"step {step}"
    positions = [line[0] for lines in expected.values() for line in lines]
    assert positions == list(range(len(positions)))
    assert len({(row, sequence) for lines in expected.values() for _, row, sequence, _ in lines}) == len(positions)
