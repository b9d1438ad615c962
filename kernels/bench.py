"""How fast each operation is beside what others would take, in one run, as a CSV file and a picture.

On a GPU every repetition begins with a cold L2 cache, and contenders take turns, so that a slow moment hits all. Medians are
reported. Before that each contender computes a small problem: who gets something else than the definition in float64 is left
out. `backward` is the difference between two medians. On a CPU the same code runs on tiny problems, as a smoke test.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.cli import InputError, log, write_atomically
from kernels import interpreter
from kernels.bench_contenders import OPERATIONS, Contender, Outputs, Problem, Run, Sizes, problems, small_problems
from kernels.bench_report import COPY, HEADING, Row, picture, table
from kernels.check import DTYPES
from kernels.plain.dropout import dropout
from kernels.random import keep_mask

RANDOM = "random"
GPU_SIZES = {"tokens": 65_536, "lengths": (64, 128, 256, 512, 1024, 2048, 4096, 10_240), "heads": 12, "head_dim": 64}
CPU_SIZES = {"tokens": 128, "lengths": (64, 128), "heads": 2, "head_dim": 64}
WARM_UP = 3
# Written twice before each run: larger than any L2, and long enough (0.7 ms on an H100) for the host to queue the run after.
FLUSH_BYTES = 1 << 30
SMOKE = "a smoke test on a CPU: these times mean nothing"
LOW_HALF = 0xFFFFFFFF


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parts = [*OPERATIONS, RANDOM]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--tokens", type=int, metavar="N", help="of each problem (default: 65536; on a CPU 128)")
    parser.add_argument("--heads", type=int, metavar="N", help="(default: 12; on a CPU 2)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="the hidden size is heads times this (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: bf16)")
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="repetitions (default: 20; the operations on a CPU: 1)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of the part `random` (default: 1)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for bench.csv and bench.png (default: benchmarks/kernels-DEVICE)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, write the files; InputError for sizes that can't be."""
    if interpreter.active():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    device = torch.device("cuda" if torch.cuda.is_available() and not interpreter.active() else "cpu")
    facts = describe(device)
    chosen = {"tokens": args.tokens, "heads": args.heads, "head_dim": args.head_dim}
    sizes = Sizes(**{**(CPU_SIZES if device.type == "cpu" else GPU_SIZES), **{k: v for k, v in chosen.items() if v}})
    if sizes.tokens < 128 or args.rounds < 1:
        raise InputError("--tokens is at least 128, which is one sequence, and --rounds at least 1")
    rows: list[Row] = []
    for operation in (part for part in OPERATIONS if part in args.only):
        if not rows:
            print(HEADING)
        for row in bench(operation, sizes, DTYPES[args.dtype], device, args.rounds if device.type == "cuda" else 1):
            print(row, flush=True)
            rows.append(row)
    result: dict[str, Any] = {"rows": [vars(row) for row in rows], **facts}
    if rows:
        warning = SMOKE if device.type == "cpu" else ""
        out = args.out or Path("benchmarks", f"kernels-{'-'.join(facts['device'].lower().replace(',', '').split())}")
        write_atomically(out / "bench.csv", table(rows, {**facts, "dtype": args.dtype, "warning": warning}))
        write_atomically(out / "bench.png", picture(rows, {**facts, "dtype": args.dtype}, warning))
        log(f"{out / 'bench.csv'}, {out / 'bench.png'}: {len(rows)} rows" + (f"; {warning.upper()}" if warning else ""))
        result |= {"csv": str(out / "bench.csv"), "png": str(out / "bench.png"), "warning": warning}
    if RANDOM in args.only:
        result |= random_costs(2048, 768, args.rounds, args.threads)
    return result


def describe(device: torch.device) -> dict[str, str]:
    """What the figures depend on besides the code."""
    here = Path(__file__).parent
    on_cpu = "cpu, interpreter" if interpreter.active() else "cpu"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "driver": _output(query) if device.type == "cuda" else "",
        "cuda": torch.version.cuda or torch.version.hip or "",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": _output(["git", "-C", str(here), "--no-optional-locks", "describe", "--always", "--dirty"]),
    }


def _output(command: list[str]) -> str:
    """The first line that a command prints; empty where it can't."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def bench(operation: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[Row]:
    """Time all who compute the operation rightly. A row without a time says why."""
    reasons: dict[str, str] = {}
    for problem in small_problems(operation, sizes, dtype, device):
        reasons = compare(problem) | reasons
    _free(device)
    for name, reason in reasons.items():
        yield Row(operation, "all", 0.0, "", name, note=reason)
    for problem in problems(operation, sizes, dtype, device):
        yield from time_problem(problem, [name for name in problem.contenders if name not in reasons], device, rounds)


def time_problem(problem: Problem, names: Sequence[str], device: torch.device, rounds: int) -> Iterator[Row]:
    """Time these contenders; who fails on this problem gets a row that says so."""
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    runs = copies(problem, device)
    for name in names:
        failure = ""
        try:
            runs |= passes(name, problem)
        except Exception as error:  # out of memory, most of all
            failure = _reason(error)
        if failure:  # only here has the exception let go of its tensors
            _free(device)
            yield Row(problem.operation, problem.case, problem.dropout_p, "", name, note=failure)
    yield from results(problem, measure(runs, flush, rounds, WARM_UP if device.type == "cuda" else 0))
    runs.clear()
    _free(device)


def compare(problem: Problem) -> dict[str, str]:
    """Why contenders can't be timed: not installed, failed, or outputs or gradients unlike those of the definition."""
    truth = values(problem, problem.truth, [leaf.double() for leaf in problem.leaves])
    reasons: dict[str, str] = {}
    for name, contender in problem.contenders.items():
        try:
            found = values(problem, contender.make(), leaves_of(problem, contender))
            errors = [_error(value, exact) for value, exact in zip(found, truth, strict=True)]
            if not all(error <= problem.allowed for error in errors):
                reasons[name] = f"computes something else: off by {max(errors):.1e}, allowed is {problem.allowed:.0e}"
        except Exception as error:  # a contender that can't run here is no reason to stop
            reasons[name] = _reason(error)
    return reasons


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double().reshape(exact.shape) - exact).abs().max() / exact.abs().max())


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def leaves_of(problem: Problem, contender: Contender) -> list[Tensor]:
    """Copies of its own, because some write over their input; q, k and v apart for those who want them so."""
    parts = problem.leaves[0].unbind(1) if contender.split else problem.leaves
    return [part.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for part in parts]


def gradients_of(outputs: Outputs) -> list[Tensor]:
    """Gradients of outputs to begin a backward pass with: the same ones for every contender."""
    device = outputs[0].device
    draw = torch.Generator(device).manual_seed(90)
    drawn = (torch.randn(output.shape, generator=draw, device=device) for output in outputs)
    return [gradient.to(output.dtype) for gradient, output in zip(drawn, outputs, strict=True)]


def values(problem: Problem, run: Run, leaves: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients in the order of the packed leaves, or what stands for them."""
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = run(*leaves)
    if problem.digest:
        (gradient,) = torch.autograd.grad(outputs, leaves, [torch.ones_like(outputs[0])])
        return [problem.digest(leaves[0].detach(), outputs[0].detach()), gradient.ne(0).double().mean()]
    gradients = torch.autograd.grad(outputs, leaves, gradients_of(outputs))
    apart = [part for gradient in gradients for part in (gradient.unbind(1) if gradient.ndim == 4 else [gradient])]
    return [value.detach() for value in (*outputs, *apart)]


def passes(name: str, problem: Problem) -> dict[tuple[str, str], Callable[[], object]]:
    """A contender's two runs, tried once."""
    contender = problem.contenders[name]
    function, leaves = contender.make(), leaves_of(problem, contender)
    gradients = gradients_of(function(*leaves))

    def backward() -> object:
        return torch.autograd.grad(function(*leaves), leaves, gradients)

    backward()
    return {(name, "forward"): lambda: function(*leaves), (name, "forward+backward"): backward}


def copies(problem: Problem, device: torch.device) -> dict[tuple[str, str], Callable[[], object]]:
    """Copies that move as many bytes as the passes must: half are read, half written."""
    forward, both = problem.cost.forward_bytes, problem.cost.forward_bytes + problem.cost.backward_bytes
    source, target = (torch.zeros(both // 2, dtype=torch.int8, device=device) for _ in range(2))
    return {
        (COPY, "forward"): lambda: target[: forward // 2].copy_(source[: forward // 2]),
        (COPY, "forward+backward"): lambda: target.copy_(source),
    }


def measure(
    runs: dict[tuple[str, str], Callable[[], object]], flush: Tensor, rounds: int, warm_up: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Median seconds of each on the device, and of the host to start it; `flush` as in `clock`."""
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for number in range(-warm_up, rounds):
        clocks = {key: clock(run, flush) for key, run in runs.items()}
        for key, read in clocks.items():
            if number >= 0:
                times[key].append(read())
    medians: dict[tuple[str, str], tuple[float, float]] = {}
    for key, taken in times.items():
        on_device, on_host = zip(*taken, strict=True)
        medians[key] = statistics.median(on_device), statistics.median(on_host)
    return medians


def clock(run: Callable[[], object], flush: Tensor) -> Callable[[], tuple[float, float]]:
    """Start `run` behind a write of `flush`; what is returned waits for it and gives the seconds of device and host."""
    if flush.device.type == "cpu":
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        return lambda: (seconds, seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_().zero_()
    begin.record()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    end.record()

    def read() -> tuple[float, float]:
        end.synchronize()
        return begin.elapsed_time(end) / 1000, seconds

    return read


def results(problem: Problem, medians: dict[tuple[str, str], tuple[float, float]]) -> Iterator[Row]:
    """Rows of both passes and of their difference."""
    cost = problem.cost
    costs = {"forward": (cost.forward_bytes, cost.forward_flops), "backward": (cost.backward_bytes, cost.backward_flops)}
    costs["forward+backward"] = (sum(cost[:2]), sum(cost[2:]))
    for way, (moved, flops) in costs.items():
        seconds = {
            name: medians[name, way] if way != "backward" else _difference(medians[name, "forward+backward"], both)
            for (name, direction), both in medians.items()
            if direction == "forward"
        }
        for name in (name for name in [*problem.contenders, COPY] if name in seconds):
            on_device, on_host = seconds[name]
            if on_device <= 0 or seconds[COPY][0] <= 0:  # a difference may come out so where times mean nothing
                continue
            yield Row(
                *(problem.operation, problem.case, problem.dropout_p, way, name),
                milliseconds=on_device * 1e3,
                host_milliseconds=on_host * 1e3,
                gigabytes_per_second=moved / on_device / 1e9,
                teraflops_per_second=flops / on_device / 1e12 if flops else None,
                fraction_of_copy=seconds[COPY][0] / on_device,
            )


def _difference(all_of_it: tuple[float, float], part: tuple[float, float]) -> tuple[float, float]:
    return all_of_it[0] - part[0], all_of_it[1] - part[1]


def _free(device: torch.device) -> None:
    """Give back what failed runs, compiled code and the allocator still hold: one problem may fill the memory."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()  # also because a function is compiled for a few shapes at most
        torch.cuda.empty_cache()


def philox_keep_mask(keys_t: Tensor, site: int, width: int, p: float, rounds: int) -> Tensor:
    """`keep_mask` with Philox4x32 (Salmon et al., SC 2011) written with the same kind of tensor operations.

    Eight 16-bit lanes a counter value. For comparison only: torch has no 32-bit high multiply, so products are int64.
    """
    groups = torch.arange((width + 7) // 8, device=keys_t.device)
    c0 = groups.expand(len(keys_t), -1)
    c1, c2, c3 = torch.full_like(c0, site), torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = keys_t[:, None] & LOW_HALF, (keys_t[:, None] >> 32) & LOW_HALF
    for _ in range(rounds):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((second >> 32) & LOW_HALF) ^ c1 ^ k0, second & LOW_HALF
        c2, c3 = ((first >> 32) & LOW_HALF) ^ c3 ^ k1, first & LOW_HALF
        k0, k1 = (k0 + 0x9E3779B9) & LOW_HALF, (k1 + 0xBB67AE85) & LOW_HALF
    lanes = torch.stack([c0, c1, c2, c3], dim=-1).to(torch.int32).view(torch.int16)
    return lanes.flatten(1)[:, :width] >= round(p * 65536) - 32768


def random_costs(tokens: int, width: int, rounds: int, threads: int) -> dict[str, Any]:
    """Median nanoseconds an element of the random generator on the CPU, beside what a user would pick instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x_td = torch.randn(tokens, width)
    keys_t = torch.randint(-(2**63), 2**63 - 1, (tokens,))
    ways: dict[tuple[str, str], Callable[[], object]] = {
        ("keep_mask", ""): lambda: keep_mask(keys_t, 0, width, 0.1),
        ("keep_mask_philox_10", ""): lambda: philox_keep_mask(keys_t, 0, width, 0.1, rounds=10),
        ("keep_mask_philox_7", ""): lambda: philox_keep_mask(keys_t, 0, width, 0.1, rounds=7),
        ("dropout", ""): lambda: dropout(x_td, 0.1, keys_t, 0),
        ("dropout_torch", ""): lambda: F.dropout(x_td, 0.1),
    }
    times = measure(ways, torch.empty(0), rounds, WARM_UP)
    torch.set_num_threads(before)
    nanoseconds = {name: seconds / x_td.numel() * 1e9 for (name, _), (seconds, _) in times.items()}
    for name, value in nanoseconds.items():
        print(f"{name:24} {value:8.2f} ns an element")
    return {"nanoseconds_an_element": nanoseconds, "tokens": tokens, "width": width}
