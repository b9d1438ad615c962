"""Who computes each operation in this process: Triton, apex or PyTorch. Chosen once, at the start, by trying.

`auto` takes the first implementation that runs on this device and agrees with PyTorch there; one that was asked for by name
and can't run is an error with the reason. Either way the choice is said. Before anything is chosen PyTorch computes all.

    for line in kernels.choose(torch.device("cuda"), torch.bfloat16, kernels.Sizes(768, 12, 3072, 4096, longest=512)):
        print(line)
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import interpreter

# In the order in which `auto` tries them on a GPU. On a CPU it takes torch.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("triton", "torch"),
    "layer_norm": ("triton", "apex", "torch"),
    "geglu": ("triton", "torch"),
    "cross_entropy": ("triton", "torch"),
    "dropout": ("triton", "torch"),
}
AUTO = "auto"
TRITON_VERSIONS = (3, 6), (3, 10)  # from, below; as in pyproject.toml
OLDEST_GPU = (8, 0)  # older ones have no bf16 and no asynchronous copies: attention would spill
_PACKAGES = {"torch": "kernels.plain", "triton": "kernels.fused"}
_FUNCTIONS = {"layer_norm": "dropout_residual_layer_norm", "cross_entropy": "masked_cross_entropy"}


class Unavailable(Exception):
    """An implementation can't run here; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """What the kernels have to cope with: the sizes of a model and of its data."""

    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    longest: int  # tokens of the longest sequence
    attention_dropout: float = 0.0


def load(operation: str, implementation: str) -> Callable[..., Any]:
    """The function of an implementation. Unavailable where what it stands on can't be imported or is too old or too new."""
    if implementation not in OPERATIONS.get(operation, ()):
        known = "; ".join(f"{known}: {', '.join(names)}" for known, names in OPERATIONS.items())
        raise ValueError(f"there is no {operation} by {implementation!r}; there are {known}")
    if implementation == "apex":
        from kernels import apex

        return apex.load()
    if implementation == "triton":
        check_triton()
    module = importlib.import_module(f"{_PACKAGES[implementation]}.{operation}")
    function: Callable[..., Any] = getattr(module, _FUNCTIONS.get(operation, operation))
    return function


def check_triton() -> None:
    """Unavailable where Triton is missing, too old or too new; repairs its interpreter where that is asked for."""
    try:
        import triton
    except ImportError:
        raise Unavailable('Triton is not installed: pip install "triton>=3.6,<3.10"') from None
    least, below = TRITON_VERSIONS
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not least <= version < below:
        raise Unavailable(f"Triton {triton.__version__} is not among the tested versions, 3.6 to 3.9")
    if interpreter.active():
        interpreter.install()


_chosen = {operation: ("torch", load(operation, "torch")) for operation in OPERATIONS}


def chosen(operation: str, x: Tensor) -> Callable[..., Any]:
    """The function that computes `operation`, for input x. ValueError where it needs a GPU and x is not on one."""
    implementation, function = _chosen[operation]
    if implementation != "torch" and x.device.type == "cpu" and not _can_take_cpu_tensors():
        raise ValueError(f"{operation}: computed by {implementation}, which needs a GPU; the input is on the CPU")
    return function


def _can_take_cpu_tensors() -> bool:
    return interpreter.active() or compiling_only


compiling_only = False  # set while kernels are compiled for a GPU that isn't there (kernels.compile)


def implementations() -> dict[str, str]:
    """The name of what computes each operation."""
    return {operation: name for operation, (name, _) in _chosen.items()}


@contextlib.contextmanager
def using(**operations: str) -> Iterator[None]:
    """These implementations inside the block, untried; for tests, checks and benchmarks."""
    before = dict(_chosen)
    _chosen.update({operation: (name, load(operation, name)) for operation, name in operations.items()})
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def obstacles(
    requests: Mapping[str, str], device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> dict[tuple[str, str], str]:
    """Why implementations can't compute an operation here; those that can are not in it.

    Tried are the one that a request names, and for `auto` all before the first that works. Each runs forward and backward
    on a few tokens with the model's sizes, and is compared with PyTorch in fp64 (`kernels.check`).

    Raises RuntimeError where the trial says nothing about the implementation: a disk or memory failed, or the GPU is broken.
    """
    found: dict[tuple[str, str], str] = {}
    for operation, request in requests.items():
        if request == AUTO and device.type == "cpu":
            continue
        for implementation in OPERATIONS[operation] if request == AUTO else (request,):
            if request == AUTO and operation == "attention" and implementation == "triton" and dtype == torch.float32:
                found[operation, implementation] = "in fp32 it is slow; ask for it by name"
                continue
            reason = _obstacle(operation, implementation, device, dtype, sizes)
            if reason is None:
                break
            found[operation, implementation] = reason
    return found


def _obstacle(operation: str, implementation: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    if implementation == "torch":
        return None
    if device.type == "cpu" and not _can_take_cpu_tensors():
        return "it needs a GPU"
    if implementation == "triton" and device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"it needs compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} (Ampere) or newer"
    from kernels import check  # it tries functions of `kernels`, which stands on this module

    try:
        with using(**{operation: implementation}):
            for case in check.trials(operation, dtype, sizes):
                for error in check.measure(case, device):
                    if not error.fits:
                        return f"{case.name}: {error}"
    except (OSError, torch.OutOfMemoryError) as error:
        where = "; TRITON_CACHE_DIR says where Triton writes" if isinstance(error, OSError) else ""
        raise RuntimeError(f"{operation} by {implementation} could not be tried: {_first_line(error)}{where}") from error
    except Exception as error:  # a compiler has many ways to fail, and any of them is a reason
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except Exception as broken:  # a kernel wrote where it must not: this process can't use the GPU any more
                what = f"{operation} by {implementation} broke the GPU's context ({_first_line(broken)})"
                raise RuntimeError(f"{what}; choose another by name") from error
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def use(requests: Mapping[str, str], found: Mapping[tuple[str, str], str], device: torch.device) -> dict[str, str]:
    """Choose for the rest of the process; returns the name of what computes each operation.

    Args:
        requests: an implementation or "auto" by operation.
        found: `obstacles`, of all processes that have to choose alike.

    Raises Unavailable for a request that has an obstacle.
    """
    names: dict[str, str] = {}
    for operation, request in requests.items():
        if request != AUTO:
            if (operation, request) in found:
                raise Unavailable(f"kernels.{operation}={request} can't run here: {found[operation, request]}")
            names[operation] = request
        elif device.type == "cpu":
            names[operation] = "torch"
        else:
            names[operation] = next(name for name in OPERATIONS[operation] if (operation, name) not in found)
    _chosen.update({operation: (name, load(operation, name)) for operation, name in names.items()})
    return names


def describe(names: Mapping[str, str], found: Mapping[tuple[str, str], str]) -> list[str]:
    """Lines for a log: what computes each operation, and why not what comes before it."""
    lines = ["kernels: " + ", ".join(f"{operation} {name}" for operation, name in names.items())]
    lines += [f"kernels: {operation}: not {name}: {reason}" for (operation, name), reason in found.items()]
    return lines


def choose(device: torch.device, dtype: torch.dtype, sizes: Sizes, requests: Mapping[str, str] | None = None) -> list[str]:
    """Try, and choose for the rest of the process; returns the lines of `describe`.

    Args:
        device, dtype, sizes: what the kernels have to cope with.
        requests: an implementation or "auto" by operation; None: "auto" for all.

    Raises Unavailable for a request that can't run here, RuntimeError as `obstacles`.
    """
    requests = dict.fromkeys(OPERATIONS, AUTO) if requests is None else requests
    found = obstacles(requests, device, dtype, sizes)
    return describe(use(requests, found, device), found)
