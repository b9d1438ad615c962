"""`python -m pretrain inspect`: what a run directory holds, and whether every byte is what was saved. Changes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, log, one_line
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint
from pretrain.lease import holder, is_alive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--no-verify", action="store_true", help="read the manifests only, not every byte")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: list and log."""
    result = inspect(args.run_dir, verify=not args.no_verify)
    log(f"{'step':>10} {'saved by':>9} {'stage':>5} {'dtype':>5} {'GB':>8}  whole")
    for row in result["steps"]:
        ranks = f"{row['world_size']} ranks" if row["world_size"] else "?"
        stage, dtype = (row[key] if row[key] is not None else "-" for key in ("zero_stage", "dtype"))
        whole = {True: "yes", False: f"NO: {row['problem']}", None: "not verified"}[row["valid"]]
        log(f"{row['step']:>10} {ranks:>9} {stage:>5} {dtype:>5} {row['bytes'] / 1e9:>8.3f}  {whole}")
    if not result["steps"]:
        log("no step was ever committed")
    for name in result["set_aside"]:
        log(f"set aside, never resumed from; remove it when you don't need it: checkpoints/{name}")
    if result["lease"]:
        lease = result["lease"]
        alive = {True: "runs here now", False: "was here and is dead", None: "may run here; it can't be looked up from here"}
        log(f"life {lease.get('life')}, pid {lease.get('pid')} on host {lease.get('host')} {alive[lease['alive']]}")
    return result


def inspect(run_dir: Path, verify: bool = True) -> dict[str, Any]:
    """Every committed step with its world size, ZeRO stage, dtype, bytes and validity; what was set aside; the lease.

    `valid` of a step is None when only its manifest was read. Raises InputError when it isn't a run directory.
    """
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{run_dir}: not a run directory, or one that never saved (no checkpoints/)")
    committed, lease = checkpoint.steps(run_dir), holder(run_dir)
    rows = [_describe(checkpoint.step_path(run_dir, step), step, verify) for step in committed]
    aside = [path.name for path in directory.iterdir() if ".damaged-" in path.name or ".left-" in path.name]
    return {
        "run_dir": str(run_dir),
        "steps": [row for row in rows if row is not None],
        "set_aside": sorted(aside),
        "lease": None if lease is None else lease | {"alive": is_alive(lease)},
    }


def _describe(path: Path, step: int, verify: bool) -> dict[str, Any] | None:
    """Sizes are what lies on the disk; the rest is the manifest's word. None when the run has removed the step meanwhile."""
    row: dict[str, Any] = {
        "step": step,
        "world_size": None,
        "zero_stage": None,
        "dtype": None,
        "position": None,
        "bytes": 0,
        "valid": None,
        "problem": None,
    }
    try:
        row["bytes"] = sum(file.stat().st_size for file in path.iterdir())
        saved = Checkpoint(path)
        row["world_size"] = saved.manifest["world_size"]
        row |= {key: saved.state.get(key) for key in ("zero_stage", "dtype")}
        row["position"] = saved.state.get("loader", {}).get("position")
        if verify:
            saved.verify()
            row["valid"] = True
    except (InputError, FileNotFoundError) as error:
        if not path.is_dir():
            return None
        row |= {"valid": False, "problem": one_line(error)}
    return row
