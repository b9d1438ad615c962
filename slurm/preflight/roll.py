"""How the ranks of a preflight find each other, do its parts at once and leave together, though some may be missing.

All of it goes through the store, not through collectives, which would hang where a rank is missing. Rank 0 leads:

    here/RANK     the rank's node, set when it has come
    word/N        rank 0's Nth word: the name of a part that all ranks now do, or "end STATUS"
    PART/RANK     what a rank found in a part, or how it failed, as JSON
    doing/RANK    where in a part the rank is, to be named when it never answers

Parts run on daemon threads, so that a rank whose disk or network hangs still hears the end and leaves.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from data_prep.cli import Hung, one_line
from pretrain.distributed import adopt_srun, is_srun_task
from slurm.preflight.check import MISS, OK, Check, listed

POLL_SECONDS = 0.05
LEAVE_SECONDS = 5.0  # that rank 0, in whose process the store lives, waits for the others to hear the end


class FirstRankLost(Hung):
    """Rank 0 did not come, or has left without a word."""


class Roll:
    """This rank's place among the ranks. `start` makes it."""

    def __init__(self, rank: int, size: int, local_rank: int, node: str, store: dist.Store) -> None:
        self.rank, self.size, self.local_rank, self.node, self.store = rank, size, local_rank, node, store
        self._words = itertools.count()

    @classmethod
    def start(cls, seconds: float) -> Roll:
        """Open the store (rank 0) or reach it, and say that this rank is here.

        Raises FirstRankLost when rank 0 can't be reached within `seconds`, Hung when rank 0 can't open its port.
        """
        if "RANK" not in os.environ and is_srun_task():
            adopt_srun()
        rank, size, local_rank = (int(os.environ.get(name, value)) for name, value in _PLACE.items())
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        if "RANK" not in os.environ:
            store: dist.Store = dist.HashStore()  # alone: no port to open
        else:
            first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun holds one itself
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            limit = timedelta(seconds=seconds)
            if not first:
                _wait_for(host, port, seconds)
            try:
                socket.getaddrinfo(host, port)  # rank 0 reaches its own store by its name too
                # Without the number of ranks, for which it would wait and then not say who is missing.
                store = dist.TCPStore(host, port, None, first, limit, wait_for_workers=False, multi_tenant=True)
            except (dist.DistError, OSError) as error:
                if first:
                    raise Hung(f"{node}: rank 0 can't be reached at {host}, port {port}: {one_line(error)}") from error
                raise FirstRankLost(f"rank 0 ({host}, port {port}) is not what answers: {one_line(error)}") from error
        roll = cls(rank, size, local_rank, node, dist.PrefixStore("preflight", store))
        roll.store.set(f"here/{rank}", node)
        roll.store.add("here", 1)
        return roll

    def came(self, seconds: float) -> dict[int, str]:
        """Rank 0: the node of every rank that came within `seconds`."""
        return {rank: node.decode() for rank, node in self._gather("here", seconds).items()}

    def ask(self, part: str, parts: Mapping[str, Callable[[], Any]], seconds: float) -> dict[int, dict[str, Any]]:
        """Rank 0: all ranks do a part; what each found, {"value": ...} or {"error": ...}, without the silent ones."""
        self.store.set(f"word/{next(self._words)}", part)
        self._begin(part, parts[part])
        return {rank: json.loads(text) for rank, text in self._gather(part, seconds).items()}

    def end(self, status: int, others: int) -> None:
        """Rank 0: let `others` leave with this status, and give them a moment to hear it."""
        self.store.set(f"word/{next(self._words)}", f"end {status}")
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.store.add("left", 0) < others and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def follow(self, parts: Mapping[str, Callable[[], Any]], seconds: float) -> int:
        """Other ranks: do what rank 0 says, and return the status to leave with.

        Raises FirstRankLost when rank 0 is gone or says nothing for `seconds`.
        """
        try:
            for number in self._words:
                deadline = time.monotonic() + seconds
                while not self.store.check([f"word/{number}"]):
                    if time.monotonic() > deadline:
                        raise FirstRankLost(f"rank 0 has not been heard of for {seconds:g} s")
                    time.sleep(POLL_SECONDS)
                word = self.store.get(f"word/{number}").decode()
                if word.startswith("end "):
                    self.store.add("left", 1)
                    return int(word.removeprefix("end "))
                self._begin(word, parts[word])
        except RuntimeError as error:  # all errors of stores are
            raise FirstRankLost(f"rank 0 has left without a word: {one_line(error)}") from error
        raise AssertionError("itertools.count ends")

    def doing(self, what: str) -> None:
        """Say where in a part this rank is."""
        self.store.set(f"doing/{self.rank}", what)

    def stands_in(self, rank: int) -> str:
        """What `doing` said last on another rank."""
        return self.store.get(f"doing/{rank}").decode() if self.store.check([f"doing/{rank}"]) else "its start"

    def _begin(self, part: str, work: Callable[[], Any]) -> None:
        def answer() -> None:
            try:
                text = json.dumps({"value": work()})
            except Exception as error:
                text = json.dumps({"error": one_line(error) or type(error).__name__})
            with suppress(RuntimeError):  # rank 0 has given up and left
                self.store.set(f"{part}/{self.rank}", text)
                self.store.add(part, 1)

        threading.Thread(target=answer, name=part, daemon=True).start()

    def _gather(self, key: str, seconds: float) -> dict[int, bytes]:
        deadline = time.monotonic() + seconds
        while self.store.add(key, 0) < self.size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        there = [rank for rank in range(self.size) if self.store.check([f"{key}/{rank}"])]
        return {rank: self.store.get(f"{key}/{rank}") for rank in there}


def _wait_for(host: str, port: int, seconds: float) -> None:
    """Return when somebody listens there. The store can wait too, but fills the log with its stacks."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > deadline:
                text = f"rank 0 ({host}, port {port}) was not there within {seconds:g} s: {one_line(error)}"
                raise FirstRankLost(text) from None
        time.sleep(10 * POLL_SECONDS)


_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # and what they are for a process started alone


def expected_nodes(size: int) -> dict[str, int]:
    """How many ranks each node of this Slurm step starts; empty where ranks aren't the tasks of a step."""
    nodes = hostnames(os.environ.get("SLURM_STEP_NODELIST", ""))
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        tasks += [int(count)] * int(times or 1)
    return dict(zip(nodes, tasks, strict=True)) if len(nodes) == len(tasks) and sum(tasks) == size else {}


def hostnames(nodelist: str) -> list[str]:
    """What `scontrol show hostnames` makes of a list such as `gpu[01-03,7],login1`; in a container there is none."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^]]*\])+", nodelist):
        pieces = re.split(r"\[([^]]*)\]", part)  # text, range, text, range, ..., text
        choices = [_numbers(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(words) for words in itertools.product(*choices)]
    return names


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def roll_call(came: dict[int, str], size: int, expected: dict[str, int], seconds: float) -> Check:
    """Whether all ranks are there; the nodes of those that are not, where Slurm knows them.

    Counted by node, because ranks may be dealt to nodes in any order (srun --distribution).
    """
    missing = [rank for rank in range(size) if rank not in came]
    if not missing:
        count: dict[str, int] = {}
        for node in came.values():
            count[node] = count.get(node, 0) + 1
        nodes = listed(f"{node} ({number})" for node, number in count.items())
        return Check("nodes", "ranks", OK, f"{size} on {nodes}")
    there = list(came.values())
    short = {node: tasks - there.count(node) for node, tasks in expected.items() if there.count(node) < tasks}
    who = listed(f"{node} ({lost} of {expected[node]} ranks)" for node, lost in short.items()) + "; " if short else ""
    fix = "look for their error above and at their nodes; where they are only slow to start, give --seconds-to-meet"
    found = f"did not come within {seconds:g} s: {who}rank{'s' * (len(missing) > 1)} {listed(missing)}"
    return Check("nodes", "ranks", MISS, found, fix, again=True, bad_nodes=tuple(short))
