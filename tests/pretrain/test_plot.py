import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from data_prep.cli import InputError
from pretrain.plot import COLOURS, add_arguments, plot, run


def make_run(path: Path, *records: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(step: int, **values: Any) -> dict[str, Any]:
    usual = {
        "loss": 5 - step / 40,
        "grad_norm": 2.0,
        "learning_rate": 1e-3,
        "tokens_per_second": 2e4,
        "step_seconds_p50": 1.0,
    }
    return {"step": step, **usual, **values}


def pixels(picture: Path, colour: str) -> int:
    """How many are of this very colour, which only the inside of a line has."""
    image = matplotlib.image.imread(picture)[..., :3]
    return int((np.abs(image - np.array(to_rgb(colour))) < 1 / 256).all(axis=-1).sum())


def test_lines_on_top_of_each_other_are_both_seen(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, *(record(step) for step in range(1, 100))) for name in ("whole", "resumed")]
    result = plot(runs, tmp_path / "deep" / "plot.png")
    assert result["runs"][1] == {"run_dir": str(runs[1]), "steps": 99, "last_loss": 5 - 99 / 40}
    picture = Path(result["out"])
    letters = Path(plot(runs[:1], tmp_path / "alone.png")["out"])  # as black as the second line
    assert pixels(picture, COLOURS[0]) > 5000
    assert pixels(picture, COLOURS[1]) > 500 + pixels(letters, COLOURS[1])
    assert pixels(picture, COLOURS[2]) == 0


def test_short_broken_and_empty_runs_are_drawn_too(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "one", record(1)),
        make_run(tmp_path / "nulls", record(1), record(2, loss=None, grad_norm=None, skipped_steps=1.0), record(3)),
        make_run(tmp_path / "diverged", record(1, loss=None, grad_norm=None)),
        make_run(tmp_path / "old", {"step": 5, "loss": 3.0, "validation_loss": 3.1}),  # without the other keys
        make_run(tmp_path / "empty"),
    ]
    with (runs[0] / "metrics.jsonl").open("a") as unfinished:
        unfinished.write('{"step": 2, "lo')
    result = plot(runs, tmp_path / "plot.png")
    assert [(each["steps"], each["last_loss"]) for each in result["runs"]] == [
        (1, 5 - 1 / 40),
        (3, 5 - 3 / 40),
        (1, None),
        (5, 3.0),
        (0, None),
    ]
    assert all(pixels(tmp_path / "plot.png", colour) for colour in COLOURS[:5])  # the last one in the legend
    plot([runs[4]], tmp_path / "empty.png")


def test_bits_a_base_have_a_panel_where_a_run_has_validated(tmp_path: Path) -> None:
    """Validated steps are joined by a line, though most records between them have no bits."""
    records = [record(step, loss=None, grad_norm=None, learning_rate=None) for step in range(1, 100)]
    for values in records:
        del values["tokens_per_second"], values["step_seconds_p50"]
    without = plot([make_run(tmp_path / "without", *records)], tmp_path / "without.png")
    for values in records[9::10]:
        values["validation_bits_per_base"] = 2.5 - values["step"] / 200
    validated = plot([make_run(tmp_path / "with", *records)], tmp_path / "with.png")
    # Of these more than half are the line: the markers alone have some 400.
    assert pixels(Path(validated["out"]), COLOURS[-1]) > pixels(Path(without["out"]), COLOURS[-1]) + 600


def test_a_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing/metrics\.jsonl: not found"):
        plot([make_run(tmp_path / "run", record(1)), tmp_path / "nothing"], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_the_verb_writes_plot_png_where_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    runs = [make_run(tmp_path / name / "run", record(1)) for name in ("a", "b")]  # directories of the same name
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["a/run", "b/run"]))["out"] == "plot.png"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for each in runs for path in each.iterdir()} == {"metrics.jsonl"}
