"""The network of a preflight: a timed all-reduce over all ranks, every link of a ring of nodes, and the nodes' clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pretrain.distributed import World, start
from slurm.preflight.check import MISS, OK, WARN, Check, listed

REPEATS = 5
FAR_BELOW = 3.0  # a link that is so many times slower than the others; racks and switches differ by less
SKEW_SECONDS = 2.0
# GB/s a rank, below which the network is not one that people train over: on GPUs that of 10-gigabit Ethernet.
LEAST_SPEED = {True: 1.0, False: 0.05}
Link = tuple[str, str]


def measure(leaders: Sequence[int], doing: Callable[[str], None], timeout_seconds: float) -> dict[str, Any]:
    """Join all ranks as training does, and time them; called by all.

    Args:
        leaders: the first rank of every node, in the order of the ring.
        doing: is told where the rank is.
        timeout_seconds: of collectives; the caller has given up before.

    Returns:
        `all_reduce`: seconds of each repeat, `bytes`: its size, `on_gpu`, `right`: whether the sums were; `links`: [leader,
        next leader, GB/s] of links that this rank timed; `clock`: wall clock before and after each of some meetings.
    """
    doing("joining the others")
    world = start(timeout_seconds)
    on_gpu = world.device.type == "cuda"
    doing("the all-reduce")
    size = (64 if on_gpu else 16) << 20
    vector = torch.empty(size // 4, device=world.device)
    right, seconds = True, []
    for _ in range(1 + REPEATS):  # the first one connects
        vector.fill_(world.rank + 1)
        world.barrier()
        began = time.perf_counter()
        dist.all_reduce(vector)
        if on_gpu:
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - began)
        low, high = torch.aminmax(vector)
        right &= float(low) == float(high) == world.size * (world.size + 1) / 2
    doing("the clocks")
    clock = []
    for _ in range(REPEATS):
        entered = time.time()
        world.barrier()
        clock.append((entered, time.time()))
    doing("the links")
    links = _ring(world, leaders, (64 if on_gpu else 4) << 20)
    world.barrier()
    dist.destroy_process_group()
    return {"all_reduce": seconds[1:], "bytes": size, "on_gpu": on_gpu, "right": right, "links": links, "clock": clock}


def rounds(count: int) -> list[list[int]]:
    """Links of a ring of `count` nodes, link i from node i to the next, in rounds in which no node has two."""
    if count < 3:
        return [[0]] if count == 2 else []
    even = list(range(0, count - count % 2, 2))
    return [even, list(range(1, count, 2))] + ([[count - 1]] if count % 2 else [])


def _ring(world: World, leaders: Sequence[int], size: int) -> list[tuple[int, int, float]]:
    """Every link carries `size` bytes forth and back, by itself at both of its nodes; its first node times it."""
    mine, vector = [], torch.zeros(size // 4, device=world.device)
    for links in rounds(len(leaders)):
        world.barrier()
        for link in links:
            a, b = leaders[link], leaders[(link + 1) % len(leaders)]
            if world.rank not in (a, b):
                continue
            times = []
            for _ in range(1 + REPEATS):
                began = time.perf_counter()
                if world.rank == a:
                    dist.send(vector, b)
                    dist.recv(vector, b)
                else:
                    dist.recv(vector, a)
                    dist.send(vector, a)
                float(vector[0])  # waits for a GPU
                times.append(time.perf_counter() - began)
            if world.rank == a:
                mine.append((a, b, 2 * size / statistics.median(times[1:]) / 1e9))
    return mine


def judge(answers: Mapping[int, Mapping[str, Any]], nodes: Mapping[int, str], silent: Mapping[int, str]) -> list[Check]:
    """Rows from what `measure` gave on each rank, {"value": ...} or {"error": ...}; `silent`: ranks that hang, and where."""
    failed = {rank: each["error"] for rank, each in answers.items() if "error" in each}
    if failed or silent:
        return [_broken(failed, silent, nodes)]
    found = {rank: each["value"] for rank, each in answers.items()}
    wrong = tuple(dict.fromkeys(nodes[rank] for rank, each in found.items() if not each["right"]))
    if wrong:
        bad = wrong if len(wrong) <= len(set(nodes.values())) / 2 else ()  # most are right, so these are not
        text = f"sums are wrong on {listed(wrong)}"
        return [Check("network", "all-reduce", MISS, text, "a GPU or network card is broken", again=True, bad_nodes=bad)]
    first, size = found[0], len(nodes)
    seconds = statistics.median(first["all_reduce"])
    speed = 2 * (size - 1) / size * first["bytes"] / seconds / 1e9  # nccl-tests' bus bandwidth
    text = f"{first['bytes'] >> 20} MB over {size} ranks: {seconds * 1e3:.1f} ms, {speed:.2f} GB/s a rank"
    links = {(nodes[a], nodes[b]): speed for each in found.values() for a, b, speed in each["links"]}
    clocks = {nodes[rank]: each["clock"] for rank, each in reversed(found.items())}
    row = Check("network", "all-reduce", OK, text)
    if speed < LEAST_SPEED[first["on_gpu"]]:
        fix = "is it the right network? name its interface in site.env (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        row = Check("network", "all-reduce", WARN, f"slow everywhere: {text}", fix)
    return [row, *_judge_links(links), *_judge_clocks(clocks, nodes[0])]


def _broken(failed: Mapping[int, str], silent: Mapping[int, str], nodes: Mapping[int, str]) -> Check:
    """Where some fail and others hang, the few are the suspects: with NCCL the broken rank fails, with gloo it hangs."""
    texts = [f"{nodes[rank]} rank {rank}: {error}" for rank, error in failed.items()]
    texts += [f"{nodes[rank]} rank {rank} hangs in {place}" for rank, place in silent.items()]
    few: set[int] = min((set(ranks) for ranks in (failed, silent) if ranks), key=len)
    bad = tuple(dict.fromkeys(nodes[rank] for rank in sorted(few))) if len(few) < len(nodes) / 2 else ()
    fix = "run it with NCCL_DEBUG=INFO; are the network interfaces of site.env those of these nodes?"
    return Check("network", "all-reduce", MISS, listed(texts, 4), fix, again=True, bad_nodes=bad)


def _judge_links(links: Mapping[Link, float]) -> list[Check]:
    if not links:
        return []
    slow = slow_nodes(links)
    odd = [link for link in slow_links(links) if not set(link) & set(slow)]
    middle = statistics.median(links.values())
    rows = []
    if slow:
        text = listed(f"{node} ({speed:.2f} GB/s, others {others:.2f})" for node, (speed, others) in slow.items())
        fix = "look at its network card and cable; leave it out with --exclude if it stays"
        rows.append(Check("network", "slow nodes", WARN, text, fix))
    if odd:
        text = listed(f"{a} - {b} ({links[a, b]:.2f} GB/s, the median is {middle:.2f})" for a, b in odd)
        rows.append(
            Check("network", "slow links", WARN, text, "something between the two: a switch, or other jobs' traffic")
        )
    if not rows:
        least = min(links, key=links.__getitem__)
        slowest = f", {' - '.join(least)} {links[least]:.2f} the slowest" if len(links) > 1 else ""
        rows.append(Check("network", "links", OK, f"{middle:.2f} GB/s between neighbouring nodes{slowest}"))
    return rows


def slow_nodes(links: Mapping[Link, float]) -> dict[str, tuple[float, float]]:
    """Nodes whose links are all far below those that don't touch them: the best of theirs, and the median of the others.

    Of two nodes neither is slower than the other; of three, the one whose absence leaves a fast link.
    """
    slow = {}
    for node in dict.fromkeys(name for link in links for name in link):
        others = [speed for link, speed in links.items() if node not in link]
        best = max(speed for link, speed in links.items() if node in link)
        if others and best * FAR_BELOW < statistics.median_high(others):
            slow[node] = best, statistics.median_high(others)
    return slow


def slow_links(links: Mapping[Link, float]) -> list[Link]:
    """Links far below the median of all."""
    middle = statistics.median_high(links.values())
    return [link for link, speed in links.items() if speed * FAR_BELOW < middle]


def _judge_clocks(clocks: Mapping[str, Sequence[Sequence[float]]], first: str) -> list[Check]:
    offsets = {node: clock_offset(clock, clocks[first]) for node, clock in clocks.items() if node != first}
    if not offsets:
        return []
    skewed = {node: offset for node, (offset, error) in offsets.items() if abs(offset) - error > SKEW_SECONDS}
    if skewed:
        text = listed(f"{node} {offset:+.1f} s" for node, offset in skewed.items()) + f" against {first}"
        return [Check("network", "clocks", WARN, text, "synchronise the clocks (chrony): logs and file times mislead")]
    worst = max(abs(offset) + error for offset, error in offsets.values())
    return [Check("network", "clocks", OK, f"within {worst * 1e3:.1f} ms of {first}")]


def clock_offset(mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """By how many seconds a clock is ahead of another, and how far that may be off.

    From (entered, left) of the same meetings on both: nobody leaves a meeting before all have entered, which holds whatever
    the ways of messages, so mine - other lies between entered - left_other and left - entered_other.
    """
    least = max(a[0] - b[1] for a, b in zip(mine, other, strict=True))
    most = min(a[1] - b[0] for a, b in zip(mine, other, strict=True))
    return (least + most) / 2, (most - least) / 2
