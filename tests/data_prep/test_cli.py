"""Writing atomically, and errors as one line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from data_prep.cli import InputError, StopRequested, add_verb, dump_json, main, progress, write_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o644

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("x.fa: two\nlines"), 2, "t: error: x.fa: two lines"),
        (FileNotFoundError(2, "No such file or directory", "x.fa"), 2, "t: error: x.fa: No such file or directory"),
        (PermissionError(13, "Permission denied", "x.fa"), 2, "t: error: x.fa: Permission denied"),
        (StopRequested("saved step 7"), 75, "t: saved step 7; run the same command again to go on"),
        (ValueError("odd"), 1, "t: failed: ValueError: odd (--debug shows where)"),
        (KeyboardInterrupt(), 130, "t: interrupted"),
    ],
)
def test_statuses(error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(args: argparse.Namespace) -> dict[str, object]:
        raise error

    parser = argparse.ArgumentParser(prog="t")
    add_verb(parser.add_subparsers(), "verb", fails, "Fails.")
    assert main(parser, ["verb"]) == status
    assert capsys.readouterr().err.splitlines() == [words]


def test_equal_values_give_equal_json() -> None:
    assert dump_json({"b": 1, "a": [2]}) == dump_json({"a": [2], "b": 1}) == b'{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'


def test_progress_yields_all_and_tells_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(5), total=5, unit="units", every_seconds=0)) == list(range(5))
    assert "4/5 units" in capsys.readouterr().err
