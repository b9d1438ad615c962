"""`python -m slurm clean` removes what our own code leaves behind, and nothing else."""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.cache import store
from data_prep.cli import InputError
from pretrain.config import load_config
from pretrain.lease import Lease
from slurm.clean import add_arguments, run
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]


def clean(*arguments: str | Path) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def names(found: dict[str, Any], top: Path) -> set[str]:
    return {str(Path(row["path"]).relative_to(top)) for row in found["found"]}


def tree(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*")}


def write(path: Path, data: bytes = b"x" * 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def save_step(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step-{step:09d}"
    name, data = "rank-00000-of-00001.safetensors", os.urandom(1000)
    write(path / name, data)
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    write(path / "MANIFEST.json", json.dumps({"files": files}).encode())
    return path


def make_run(run_dir: Path) -> Path:
    for step in (100, 200, 300):
        save_step(run_dir, step)
    config = load_config("tiny", [f"run_dir={run_dir}", "data.path=dataset"]).model_dump(mode="json")
    write(run_dir / "config.yaml", yaml.safe_dump(config).encode())
    write(run_dir / "exit.json", b'{"status": 0}')
    return run_dir


def test_a_run_loses_what_its_dead_lives_left_and_nothing_else(tmp_path: Path) -> None:
    run_dir, elsewhere = make_run(tmp_path / "runs" / "a"), tmp_path / "elsewhere"
    checkpoints = run_dir / "checkpoints"
    kept = tree(tmp_path)
    leftovers = {
        "checkpoints/step-000000400.tmp-life/rank-00000-of-00001.safetensors",
        "checkpoints/step-000000250.damaged-life/MANIFEST.json",
        "checkpoints/step-000000260.left-life/MANIFEST.json",
        "hangs/20260501T120000-0a1b2c-rank-00000.txt",
        "profile/rank-00000-steps-3-5.json.gz",
        ".exit.json.ab_9cdef",
        ".preflight.json.ab_9cdef",
        ".preflight-ab_9cdef",
    }
    for name in leftovers:
        write(run_dir / name)
        if name.startswith(".preflight"):
            os.utime(run_dir / name, (time.time() - 7200,) * 2)
    write(run_dir / ".preflight-fedc9_ba")  # of checks that may be at work
    write(elsewhere / "of-others")
    (checkpoints / "step-000000500.tmp-linked").symlink_to(elsewhere)
    (tmp_path / "runs" / "linked").symlink_to(run_dir)
    for name in ("mine.tmp-life/file", "step-five.tmp-life/file"):
        write(checkpoints / name)
    write(tmp_path / "runs" / "hangs" / "file")  # no run's
    write(run_dir / ".exit.json.swp")
    before = tree(tmp_path)

    assert clean(tmp_path / "runs", "--yes")["found"] == []  # all of it is younger than a week
    listed = clean(tmp_path / "runs", "--older-than", "0")
    expected = {name if name.startswith(".") else name.rpartition("/")[0] for name in leftovers}
    assert names(listed, run_dir) == expected and not listed["removed"] and listed["bytes"] == 8000
    assert tree(tmp_path) == before

    assert clean(tmp_path / "runs", "--older-than", "0", "--yes")["removed"]
    after = tree(tmp_path)
    assert after == before - {f"runs/a/{name}" for name in leftovers | expected} and kept < after


def test_files_of_others_in_a_run_stay(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    ours = {"hangs/20260501T120000-0a1b2c-rank-00012.txt", "profile/summary.json", "profile/.rank-00000-steps-3-5.json.gz"}
    for name in ours:
        write(run_dir / name)
    for name in ("hangs/notes.txt", "profile/nsys/report", "profile/rank-00000-steps-3-5.json.gz/mine"):
        write(run_dir / name)
    before = tree(run_dir)
    found = clean(run_dir, "--older-than", "0", "--yes")
    assert names(found, run_dir) == {"hangs", "profile"} and found["bytes"] == 3000
    assert before - tree(run_dir) == ours


def test_runs_of_other_projects_are_left_alone(tmp_path: Path) -> None:
    for number, config in enumerate([b"model: resnet\ndata: {}\ntrain: {}\ncheckpoint: {}\n", b"- 1\n", b"\xff: [", b""]):
        for name in (
            "checkpoints/step-1.tmp-2/weights",
            "hangs/20260501T120000-0a1b2c-rank-00000.txt",
            ".exit.json.ab_9cdef",
        ):
            write(tmp_path / str(number) / name)
        write(tmp_path / str(number) / "config.yaml", config)
    before = tree(tmp_path)
    assert clean(tmp_path, "--older-than", "0", "--yes")["found"] == [] and tree(tmp_path) == before


def test_what_killed_checks_left_goes_also_where_no_run_began(tmp_path: Path) -> None:
    for name in ("run/.preflight-ab_9cdef", "run/preflight.json", "other/.preflight-ab_9cdef", "other/code.py"):
        write(tmp_path / name)
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    assert names(clean(tmp_path, "--older-than", "0"), tmp_path) == {"run/.preflight-ab_9cdef"}


def test_a_pipeline_loses_what_was_set_aside_when_its_run_went_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    set_aside = {f"{name}.before-20260501T120000" for name in ("hf", "results", "report")}
    for top in (out, tmp_path / "other"):
        for name in (*set_aside, "hf", "hf.before-mine", "logs.before-20260501T120000"):
            write(top / name / "file")
        write(top / ".pipeline.json.ab_9cdef")
    old = time.time() - 30 * 86400
    for name in set_aside:
        os.utime(out / name / "file", (old, old))
    write(out / "pipeline.json", b'{"stages": {}}')
    write(tmp_path / "other" / "pipeline.json", b"[]")
    make_run(out / "run")
    write(out / "run" / ".exit.json.ab_9cdef")
    assert clean(tmp_path, "--yes")["found"] == []  # set aside just now, however old
    found = names(clean(tmp_path, "--older-than", "0", "--yes"), out)
    assert found == set_aside | {".pipeline.json.ab_9cdef", "run/.exit.json.ab_9cdef"}
    assert not any((out / name).exists() for name in found) and (out / "hf" / "file").exists()


def test_a_run_that_somebody_holds_is_left_alone(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    write(run_dir / "checkpoints" / "step-000000400.tmp-life" / "file")
    lease = Lease.take(run_dir, "life")
    try:
        found = clean(run_dir, "--older-than", "0", "--finished-checkpoints", "--yes")
        assert found["found"] == [] and [row["path"] for row in found["kept"]] == [str(run_dir)]
        shutil.copytree(run_dir, tmp_path / "copy")
        assert names(clean(tmp_path / "copy", "--older-than", "0"), tmp_path) == {"copy/checkpoints/step-000000400.tmp-life"}
    finally:
        left = json.loads((run_dir / "lease.json").read_text())
        lease.release()
    (run_dir / "lease.json").write_text("{")
    assert "can't be read" in clean(run_dir, "--older-than", "0")["kept"][0]["why"]
    # An owner elsewhere may live or not; one here, of whom only the number is left, is dead.
    (run_dir / "lease.json").write_text(json.dumps(left | {"host": "elsewhere"}))
    assert "may live here, on host elsewhere" in clean(run_dir, "--older-than", "0")["kept"][0]["why"]
    (run_dir / "lease.json").write_text(json.dumps(left | {"pid_start": 1}))
    assert names(clean(run_dir, "--older-than", "0"), run_dir) == {"checkpoints/step-000000400.tmp-life"}


def test_a_finished_run_keeps_its_last_checkpoint_if_that_is_whole(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    steps = {f"checkpoints/step-{step:09d}" for step in (100, 200)}
    command: list[str | Path] = [run_dir, "--older-than", "0", "--finished-checkpoints"]
    assert clean(run_dir, "--older-than", "0")["found"] == []
    assert names(clean(*command), run_dir) == steps
    (run_dir / "exit.json").write_text('{"status": 75}')
    assert clean(*command)["found"] == []
    (run_dir / "exit.json").write_text('{"status": 0}')
    last = run_dir / "checkpoints" / "step-000000300" / "rank-00000-of-00001.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    damaged = clean(*command, "--yes")
    assert damaged["found"] == [] and "is damaged, so the earlier ones are kept" in damaged["kept"][0]["why"]
    last.write_bytes(whole)
    clean(*command, "--yes")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000000300"]


def test_a_finished_dataset_loses_its_working_state(tmp_path: Path) -> None:
    manifest = json.dumps({"format_version": 1, "splits": {}, "species": []}).encode()
    for name in ("finished", "begun"):
        write(tmp_path / name / "train" / "000000.tar")
        write(tmp_path / name / "train" / ".000001.tar.abcd_123.partial")
        write(tmp_path / name / "valid" / ".shards.npy.abcd_123")
        write(tmp_path / name / ".work" / "unit-000000.json")
    write(tmp_path / "finished" / "manifest.json", manifest)
    before = tree(tmp_path)
    clean(tmp_path, "--older-than", "0", "--yes")
    removed = {".work", ".work/unit-000000.json", "train/.000001.tar.abcd_123.partial", "valid/.shards.npy.abcd_123"}
    assert before - tree(tmp_path) == {f"finished/{name}" for name in removed}


def test_a_cache_loses_the_blocks_that_nobody_read_lately(tmp_path: Path) -> None:
    cache, old = tmp_path / "cache", time.time() - 30 * 86400
    blocks = [cache / "blocks" / name[:2] / f"{name}-0" for name in ("ab" * 32, "cd" * 32)]
    table = cache / "files" / ("ef" * 32)
    for path in (*blocks, table):
        store(path, b"data")
    for path in (blocks[0], table):
        os.utime(path, (old, old))
    for name in ("blocks/ab/file", "files/table"):  # laid out alike, but somebody else's
        write(tmp_path / "other" / name)
        os.utime(tmp_path / "other" / name, (old, old))
    found = clean(tmp_path, "--yes")
    assert names(found, tmp_path) == {"cache"} and found["bytes"] == 4 and found["found"][0]["why"].startswith("1 blocks")
    assert not blocks[0].exists() and blocks[1].exists() and table.exists() and (tmp_path / "other/blocks/ab/file").exists()


def test_what_can_not_be_removed_is_named_and_the_rest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run")
    for name in ("step-000000250.damaged-life", "step-000000400.tmp-life"):
        write(run_dir / "checkpoints" / name / "file")
    immovable = run_dir / "checkpoints" / "step-000000250.damaged-life"
    rmtree = __import__("shutil").rmtree

    def refuse(path: Path) -> None:  # root, as which tests run, may remove everything
        if path == immovable:
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path)

    monkeypatch.setattr("slurm.clean.shutil.rmtree", refuse)
    with pytest.raises(RuntimeError, match="1 files or directories could not be removed"):
        clean(run_dir, "--older-than", "0", "--yes")
    assert f"can't be removed: {immovable}: Permission denied" in capfd.readouterr().err
    assert immovable.is_dir() and not (run_dir / "checkpoints" / "step-000000400.tmp-life").exists()


def test_nothing_to_look_at_is_refused(tmp_path: Path) -> None:
    for arguments in ([], [tmp_path / "missing"], [tmp_path, "--older-than", "-1"]):
        with pytest.raises(InputError):
            clean(*arguments)


@pytest.mark.slurm
def test_scratch_of_jobs_that_slurm_does_not_know_goes(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.submit("--hold", "--wrap", "true")
    try:
        for name in (f"dnabert2-root-{job}", "dnabert2-root-999999", "dnabert2-other-999999", "dnabert2-root-999999.mine"):
            write(tmp_path / name / "triton" / "kernel")
        (tmp_path / "dnabert2-root-999998").symlink_to(tmp_path / "dnabert2-other-999999")
        command = [sys.executable, "-m", "slurm", "clean", "--scratch", "--yes", "--json"]
        done = cluster.run(*command, check=False, LOCAL_SCRATCH=str(tmp_path), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        assert names(json.loads(done.stdout.splitlines()[-1]), tmp_path) == {"dnabert2-root-999999"}
        assert len(list(tmp_path.iterdir())) == 4 and not (tmp_path / "dnabert2-root-999999").exists()
    finally:
        cluster.run("scancel", job)
