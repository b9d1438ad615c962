"""RUN_DIR/lives.jsonl survives lives that were killed while they wrote it."""

from pathlib import Path

import pytest

from pretrain.lives import read_lives, record_life


def test_a_torn_line_costs_no_other_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_lives(tmp_path) == []
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(name, value)
    record_life(tmp_path, "first", 4, 0)
    path = tmp_path / "lives.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert [life["life"] for life in read_lives(tmp_path)] == ["first"]
    record_life(tmp_path, "third", 2, 100)
    first, third = read_lives(tmp_path)
    assert (first["job"], first["restart"], first["nodes"], first["ranks"]) == ("7", 2, "node[1-2]", 4)
    assert (third["life"], third["from_step"]) == ("third", 100)
