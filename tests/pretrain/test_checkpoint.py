import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_prep.cli import InputError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, Fragment

SHAPES = {"a": (4, 3), "b": (5,)}
VALUES = {name: torch.arange(float(torch.Size(shape).numel())) + 0.5 for name, shape in SHAPES.items()}


def fragment(name: str, start: int, end: int) -> Fragment:
    kinds = {"weight": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}
    return Fragment(name, start, {kind: VALUES[name][start:end] * factor for kind, factor in kinds.items()})


def save(run_dir: Path, step: int = 1, fragments: list[Fragment] | None = None) -> Path:
    if fragments is None:
        fragments = [fragment("a", 0, 12), fragment("b", 0, 5)]
    rest: dict[str, Any] = {"life": "x", "shapes": SHAPES, "model": {"m": 1}, "state": {"optimizer_step": step}}
    return checkpoint.save(run_dir, step=step, fragments=fragments, **rest)


@settings(max_examples=20)
@given(st.sets(st.integers(1, 11)), st.integers(0, 11), st.integers(1, 12))
def test_any_stretch_is_read_from_any_fragments(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], start: int, numel: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    edges = [0, *sorted(cuts), 12]
    pieces = [fragment("a", a, b) for a, b in itertools.pairwise(edges)] + [fragment("b", 0, 5)]
    directory = checkpoint.temporary_path(run_dir, 7, "x")
    directory.mkdir(parents=True)
    listings = [checkpoint.write_rank(directory, rank, 2, pieces[rank::2]) for rank in (1, 0)]
    saved = Checkpoint(checkpoint.commit(directory, listings, SHAPES, {"m": 1}, {}))
    numel = min(numel, 12 - start)
    assert torch.equal(saved.read("a", "exp_avg", start, numel), 2 * VALUES["a"][start : start + numel])
    assert torch.equal(saved.weights()["a"], VALUES["a"].view(4, 3))
    assert saved.has_optimizer_state and (saved.step, saved.manifest["world_size"]) == (7, 2)
    saved.verify()


@pytest.mark.parametrize("pieces", [[(0, 5)], [(0, 5), (6, 12)], [(0, 7), (5, 12)], []])
def test_fragments_that_do_not_cover_a_parameter_are_never_committed(tmp_path: Path, pieces: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="a: fragments"):
        save(tmp_path, fragments=[fragment("a", *piece) for piece in pieces] + [fragment("b", 0, 5)])
    assert checkpoint.steps(tmp_path) == []


def damage_tensors(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def truncate_tensors(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


def remove_tensors(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def damage_manifest(path: Path) -> None:
    file = path / "MANIFEST.json"
    file.write_text(file.read_text().replace('"optimizer_step": 2', '"optimizer_step": 3'))


def truncate_manifest(path: Path) -> None:
    file = path / "MANIFEST.json"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [damage_tensors, truncate_tensors, remove_tensors, damage_manifest, truncate_manifest])
def test_a_damaged_step_is_passed_over_for_the_one_before_it(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert "step-000000002" in capsys.readouterr().err


def test_every_file_is_verified_by_one_rank(tmp_path: Path) -> None:
    directory = checkpoint.temporary_path(tmp_path, 2, "x")
    directory.mkdir(parents=True)
    pieces = [fragment("a", 0, 6), fragment("a", 6, 12), fragment("b", 0, 5)]
    listings = [checkpoint.write_rank(directory, rank, 3, [piece]) for rank, piece in enumerate(pieces)]
    saved = Checkpoint(checkpoint.commit(directory, listings, SHAPES, {}, {}))
    damaged = saved.path / listings[1]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    complaints = 0
    for rank in range(2):
        try:
            saved.verify(rank, 2)
        except checkpoint.DamagedError:
            complaints += 1
    assert complaints == 1


def test_a_starting_run_renames_what_it_does_not_use_and_removes_what_was_left(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    leftover = checkpoint.temporary_path(tmp_path, 3, "dead")
    leftover.mkdir()
    checkpoint.remove_leftovers(tmp_path)
    checkpoint.set_aside(tmp_path, 1, "damaged", "life")
    assert (tmp_path / "checkpoints" / "step-000000002.damaged-life").is_dir()
    assert not leftover.exists() and checkpoint.steps(tmp_path) == [1]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-000000001\n"


def test_where_no_step_is_whole_it_says_so(tmp_path: Path) -> None:
    for step in (1, 2):
        damage_tensors(save(tmp_path, step))
    with pytest.raises(InputError, match="2 steps, none whole, nothing was changed"):
        checkpoint.newest(tmp_path)


def test_a_step_of_another_format_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(InputError, match="format_version 2, this code reads 1"):
        checkpoint.newest(tmp_path)


def test_retention_keeps_the_newest_and_every_nth_for_good(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
    checkpoint.retain(tmp_path, keep_last=2, keep_every=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    save(tmp_path, 8)
    shutil.rmtree(checkpoint.step_path(tmp_path, 6))  # as if a bad step had put its save off to the next one
    checkpoint.retain(tmp_path, keep_last=1, keep_every=3)
    assert checkpoint.steps(tmp_path) == [3, 7, 8]
    checkpoint.retain(tmp_path, keep_last=1, keep_every=0)
    assert checkpoint.steps(tmp_path) == [8]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-000000008\n"


def test_any_safetensors_reader_opens_the_files(tmp_path: Path) -> None:
    path = next(save(tmp_path).glob("*.safetensors"))
    tensors = load_file(path)
    assert torch.equal(tensors["weight/0/b"], VALUES["b"]) and tensors["exp_avg/0/a"].shape == (12,)
    assert path.stat().st_size % 8 == 4  # 51 numbers of 4 bytes after a header padded to 8


def test_a_manifest_can_not_point_outside_its_folder(tmp_path: Path) -> None:
    saved = Checkpoint(save(tmp_path))
    saved.manifest["files"]["../../secret"] = {"sha256": "", "bytes": 0}
    with pytest.raises(InputError, match="relative"):
        saved.verify()


def test_a_parameter_of_another_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parameter c"):
        Checkpoint(save(tmp_path)).read("c", "weight", 0, 1)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
