"""What the random generator costs beside what a user would pick instead, in one run.

The rest of the kernels is plain PyTorch so far and has nothing to be compared with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.random import dropout, keep_mask

LOW_HALF = 0xFFFFFFFF


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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Median nanoseconds an element of each way; rounds alternate between the ways, so that a slow moment hits all."""
    torch.set_num_threads(args.threads)
    x_td = torch.randn(args.tokens, args.width)
    keys_t = torch.randint(-(2**63), 2**63 - 1, (args.tokens,))
    ways: dict[str, Callable[[], Tensor]] = {
        "keep_mask": lambda: keep_mask(keys_t, 0, args.width, 0.1),
        "keep_mask_philox_10": lambda: philox_keep_mask(keys_t, 0, args.width, 0.1, rounds=10),
        "keep_mask_philox_7": lambda: philox_keep_mask(keys_t, 0, args.width, 0.1, rounds=7),
        "dropout": lambda: dropout(x_td, 0.1, keys_t, 0),
        "dropout_torch": lambda: F.dropout(x_td, 0.1),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - started)
    nanoseconds = {name: statistics.median(t) / x_td.numel() * 1e9 for name, t in times.items()}
    for name, value in nanoseconds.items():
        print(f"{name:24} {value:8.2f} ns an element")
    return {"nanoseconds_an_element": nanoseconds, "tokens": args.tokens, "width": args.width, "torch": torch.__version__}
