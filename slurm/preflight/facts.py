"""What a rank of a preflight finds out by itself: packages, its device, limits, the dataset and the disks of its node.

Facts are small JSON; `judge` makes rows of those of all ranks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_prep.cli import InputError, one_line
from pretrain import run_directory
from pretrain.config import Config
from pretrain.distributed import is_srun_task
from pretrain.loader import open_dataset
from pretrain.plan import disk_bytes
from slurm.preflight import disk
from slurm.preflight.roll import Roll

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "dnabert2-pretraining"
OPTIONAL = ("triton", "apex")
ECC = "ecc.errors.uncorrected.volatile.total"


def collect(roll: Roll, config: Config, going_back: bool) -> dict[str, Any]:
    """The facts of this rank, by section; a section that fails is {"error": why}.

    What holds for a whole node is looked at by its first rank, and the run directory's room by rank 0.
    """
    run_dir = Path(config.run_dir)
    facts: dict[str, Any] = {}
    sections: dict[str, Callable[[], Any]] = {"packages": packages, "device": lambda: device(roll.local_rank)}
    if roll.local_rank == 0:
        sections = {"run_dir": lambda: disk.see(roll, run_dir)} | sections | {"limits": limits}
        sections |= {"scratch": lambda: scratch(config), "dataset": lambda: dataset(roll, config, going_back)}
    if roll.rank == 0:

        def room() -> dict[str, Any]:
            needed = facts["dataset"].get("disk_bytes") or disk_bytes(config)
            return disk.room(run_dir, needed)

        sections["room"] = room
    for name, look in sections.items():
        roll.doing(name)
        try:
            facts[name] = look()
        except Exception as error:
            facts[name] = {"error": one_line(error) or type(error).__name__}
    return facts


def requirements() -> tuple[str, list[str]]:
    """Python's range and what the project requires, extras included: as installed, or of the clone it is run from.

    Empty where neither can be read (Python 3.10 reads no TOML): then packages only have to be there.
    """
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        return metadata["Requires-Python"] or "", metadata.get_all("Requires-Dist") or []
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        tomllib = importlib.import_module("tomllib")  # since Python 3.11
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    except ImportError:
        return "", ["torch", "deepspeed", "numpy", "safetensors", "tokenizers", "webdataset"]
    return project["requires-python"], project["dependencies"] + project["optional-dependencies"]["triton"]


def packages() -> dict[str, Any]:
    """Versions of Python and of what the project requires; None for what isn't there."""
    from packaging.requirements import Requirement

    _, required = requirements()
    names = [r.name for r in map(Requirement, required) if r.marker is None or r.marker.evaluate({"extra": ""})]
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*names, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # apex can be built without leaving metadata; Triton can be a folder on PYTHONPATH.
            versions[name] = "unknown" if importlib.util.find_spec(name) else None
    return versions


def device(local_rank: int) -> dict[str, Any]:
    """The GPU that `pretrain train` would take on this rank, tried with one product; or the CPU."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    facts: dict[str, Any] = {
        "visible": visible,
        "index": 0 if visible == 1 and is_srun_task() else local_rank,  # as `pretrain.distributed.start` chooses
        "given": int(given) if given.isdigit() else 0,
        "cuda": torch.version.cuda,
    }
    if visible == 0:
        return facts | _multiply(torch.device("cpu"), 1024)
    if facts["index"] >= visible:
        return facts
    gpu = torch.device("cuda", facts["index"])
    free, total = torch.cuda.mem_get_info(gpu)
    facts |= {"name": torch.cuda.get_device_name(gpu), "used": total - free, "ecc": {}}
    if local_rank == 0:
        facts["ecc"] = _ecc_errors()
    return facts | _multiply(gpu, 8192)


def _multiply(where: torch.device, size: int) -> dict[str, Any]:
    """Whether a product is right, and the median seconds of one.

    The small one has elements of -1, 0 and 1, so that it is exact in every format and order of summing.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (256, 256), generator=generator).float() for _ in range(2))
    right = torch.equal((a.to(where) @ b.to(where)).cpu(), (a.double() @ b.double()).float())
    on_gpu = where.type == "cuda"
    large = torch.ones(size, size, device=where, dtype=torch.bfloat16 if on_gpu else torch.float32)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        large @ large
        if on_gpu:
            torch.cuda.synchronize(where)
        times.append(time.perf_counter() - began)
    return {"right": right, "seconds": statistics.median(times[1:])}


def _ecc_errors() -> dict[str, int]:
    """Uncorrected ECC errors since the driver was loaded, of the node's GPUs that have any; {} where nobody can tell."""
    command = ["nvidia-smi", f"--query-gpu=index,{ECC}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = [line.split(", ") for line in lines]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit() and int(pair[1])}


def limits() -> dict[str, int]:
    """Soft limits of this process; -1: none."""
    names = {"open files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK}
    return {name: resource.getrlimit(number)[0] for name, number in names.items()}


def scratch(config: Config) -> dict[str, Any]:
    """Bytes free on the disks of this node, and how many there should be."""
    needed = {tempfile.gettempdir(): 1e9, os.environ.get("LOCAL_SCRATCH", tempfile.gettempdir()): 1e9}
    if torch.cuda.is_available():
        needed["/dev/shm"] = 1e9  # NCCL's buffers between the GPUs of a node; containers start with 64 MB
    if "://" in config.data.path and config.data.cache_dir:
        needed[config.data.cache_dir] = config.data.cache_gb * 1e9
    facts = {}
    for path, least in needed.items():
        there = disk.existing(Path(path))
        facts[path] = {"free": shutil.disk_usage(there).free, "needed": int(least), "writable": os.access(there, os.W_OK)}
    return facts


def dataset(roll: Roll, config: Config, going_back: bool) -> dict[str, Any]:
    """Open the dataset as training does, read a block (every rank another one), and see whether the run may go on with it.

    Raises InputError or OSError for what training could not read.
    """
    config, opened = open_dataset(config)
    train = opened.split("train")
    if len(train.shards) == 0:
        raise InputError(f"{opened.path}: has no training sequences")
    train.read_block(roll.rank * len(train.shards) // roll.size, 0)
    facts: dict[str, Any] = {
        "path": str(opened.path),
        "sha256": opened.sha256,
        "sequences": int(train.shards["sequences"].sum()),
        "vocab_size": config.model.vocab_size,
        "disk_bytes": disk_bytes(config),
    }
    if roll.rank == 0:
        try:
            run_directory.check(config, Path(config.run_dir), opened, going_back)
        except InputError as error:
            facts["refused"] = one_line(error)
    return facts
