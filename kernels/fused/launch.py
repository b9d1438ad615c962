"""What a launch needs to know about the device: which tile fits it, and how to start a kernel there.

Block sizes stand in `tiles.yaml`, a table: under a kernel's name, rows in order of preference. A row's `shared` is the
shared memory that its kernel was compiled to, in bytes (the compile tests hold it to that); a device with less gets a later
row.
"""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from triton.runtime import driver

from kernels import interpreter

TILES: dict[str, list[dict[str, Any]]] = yaml.safe_load((Path(__file__).parent / "tiles.yaml").read_text())
INTERPRETER_SHARED = 1 << 30  # bytes: no limit


def device_limits() -> tuple[int | str, int]:
    """Architecture (90 for sm_90, "gfx942", "interpreter") and shared memory a program may use, in bytes."""
    if interpreter.active():
        return "interpreter", INTERPRETER_SHARED
    return _limits(driver.active.get_current_device())


@cache
def _limits(device: int) -> tuple[int | str, int]:
    """Of a device by number; asking the driver takes longer than a launch."""
    properties = driver.active.utils.get_device_properties(device)
    return driver.active.get_current_target().arch, properties["max_shared_mem"]


@cache
def multiprocessors(device: int) -> int:
    """How many multiprocessors a device has, by its number."""
    return int(driver.active.utils.get_device_properties(device)["multiprocessor_count"])


def tile(kernel: str, **facts: Any) -> dict[str, Any]:
    """Block sizes and launch options of the first row of `kernel` that is meant for these facts and fits the current device.

    `facts` describe the problem (`head_dim=64, bits=16, dropout=False`). A row's entry of the same name must be equal to
    the fact, or a list that holds it; a row without the entry serves all. Its `arch`, a list, is compared in the same way.

    Raises ValueError where no row does: the kernel can't run this problem on this device.
    """
    found = fitting_tile(kernel, **facts)
    if found is None:
        problem = ", ".join(f"{name} {value}" for name, value in facts.items())
        arch, shared = device_limits()
        raise ValueError(f"{kernel} has no tile for {problem} on {arch} with {shared} bytes of shared memory (tiles.yaml)")
    return found


def fitting_tile(kernel: str, **facts: Any) -> dict[str, Any] | None:
    """The same, or None where no row fits."""
    found = _tile(kernel, *device_limits(), tuple(facts.items()))
    return None if found is None else dict(found)


@cache
def _tile(kernel: str, arch: int | str, shared: int, facts: tuple[tuple[str, Any], ...]) -> dict[str, Any] | None:
    wanted = {**dict(facts), "arch": arch}
    for row in TILES[kernel]:
        if row["shared"] <= shared and all(_fits(row[name], wanted[name]) for name in row.keys() & wanted.keys()):
            return {name: value for name, value in row.items() if name not in wanted and name != "shared"}
    return None


def _fits(entry: Any, fact: Any) -> bool:
    return fact in entry if isinstance(entry, list) else fact == entry


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
    """Start a Triton kernel on `device`, which need not be the current one, but of its kind. An empty grid starts nothing.

    Fused multiply-adds are asked for: without them inner loops grow by a tenth, and they stop being Triton's default.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **options)
