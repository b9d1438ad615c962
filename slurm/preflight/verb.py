"""`python -m slurm preflight`: whether a run would work on the nodes of this job, found out before it wastes hours.

Started like `pretrain train`, as the same tasks and with the same arguments. Rank 0 gathers what the ranks find, prints one
table, writes RUN_DIR/preflight.json and says with which status all leave; see `roll` for how they keep together,
`facts` and `links` for what is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.cli import BAD_INPUT, DONE, HUNG, Hung, InputError, dump_json, leave, log, one_line, write_atomically
from slurm.preflight.check import MISS, Check, table, worst

if TYPE_CHECKING:
    from pretrain.config import Config
    from slurm.preflight.roll import Roll

FILE = "preflight.json"
PART_SECONDS = 60.0  # for all ranks to find their facts, or to time the network; both take a few on healthy nodes
MARGIN_SECONDS = 30.0
PARTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("config", metavar="CONFIG", help="as for `pretrain train`")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for `pretrain train`")
    parser.add_argument("--from-step", type=int, metavar="N", help="as for `pretrain train`")
    parser.add_argument("--profile", type=int, help=argparse.SUPPRESS)  # of `pretrain train`, for the same command line
    parser.add_argument(
        "--seconds-to-meet",
        type=float,
        default=120.0,
        metavar="S",
        help="how long to wait for all ranks before the missing ones are named (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb. Returns the result, on rank 0 where nothing is missing.

    Raises InputError when something is missing that an operator has to mend, Hung when only nodes are at fault. Other ranks
    leave the process with the same status and say nothing.
    """
    if args.seconds_to_meet <= 0:
        raise InputError(f"--seconds-to-meet {args.seconds_to_meet}: must be over 0")
    try:
        from pretrain.config import load_config
        from slurm.preflight.roll import FirstRankLost, Roll
    except ImportError as error:
        raise InputError(f"{os.uname().nodename}: {one_line(error)}; install the project there (docs/install.md)") from None
    try:
        config = load_config(args.config, args.overrides)
    except InputError:
        if _local_rank() > 0:
            leave(BAD_INPUT)  # one line a node is enough
        raise
    run_dir = Path(config.run_dir)
    before = _read(run_dir / FILE)
    _leave_within(args.seconds_to_meet + (PARTS + 1) * (PART_SECONDS + MARGIN_SECONDS))
    try:
        roll = Roll.start(args.seconds_to_meet)
        if roll.rank > 0:
            status = roll.follow(_parts(roll, config, args), args.seconds_to_meet + PART_SECONDS + MARGIN_SECONDS)
            return {} if status == DONE else leave(status)
    except FirstRankLost as error:
        _report_first_rank(run_dir, before, error)
        leave(HUNG)
    except Hung as error:  # rank 0 can't open its port: written here, or the others would say that its node is broken
        fix = "none: the next start of the job takes another port"
        _write(run_dir, _result([Check("nodes", "rank 0", MISS, one_line(error), fix, again=True)]))
        raise
    checks, others = _checks(roll, config, args)
    result = _result(checks)
    if args.json and result["status"] != DONE:
        print(json.dumps(result, sort_keys=True), flush=True)  # `main` prints it where nothing is raised
    for line in table(checks):
        log(line)
    _write(run_dir, result)
    roll.end(result["status"], others)
    if result["status"] != DONE:
        raise _failure(checks)
    return result


def _parts(roll: Roll, config: Config, args: argparse.Namespace) -> Mapping[str, Callable[[], Any]]:
    """What every rank does when rank 0 says so."""
    from slurm.preflight.facts import collect
    from slurm.preflight.links import measure

    def network() -> dict[str, Any]:
        leaders = json.loads(roll.store.get("leaders"))
        return measure(leaders, roll.doing, PART_SECONDS + 2 * MARGIN_SECONDS)

    return {"facts": lambda: collect(roll, config, args.from_step is not None), "network": network}


def _checks(roll: Roll, config: Config, args: argparse.Namespace) -> tuple[list[Check], int]:
    """Rank 0: all rows, and how many other ranks are there to hear the end."""
    from slurm.preflight import disk, judge, links
    from slurm.preflight.roll import expected_nodes, roll_call

    nodes = roll.came(args.seconds_to_meet)
    checks = [roll_call(nodes, roll.size, expected_nodes(roll.size), args.seconds_to_meet)]
    others = len(nodes) - 1
    if checks[0].verdict == MISS:
        return checks, others
    parts = _parts(roll, config, args)
    answers = roll.ask("facts", parts, PART_SECONDS)
    disk.forget(roll, Path(config.run_dir))
    facts = {rank: answer["value"] for rank, answer in answers.items() if "value" in answer}
    if silent := {rank: roll.stands_in(rank) for rank in nodes if rank not in facts}:
        checks.append(judge.silent(nodes, silent))
    checks += judge.judge(facts, nodes, config)
    if roll.size > 1 and not any(check.verdict == MISS and check.again for check in checks):
        leaders = {node: rank for rank, node in reversed(nodes.items())}
        roll.store.set("leaders", json.dumps(sorted(leaders.values())))
        answers = roll.ask("network", parts, PART_SECONDS)
        silent = {rank: roll.stands_in(rank) for rank in nodes if rank not in answers}
        checks += links.judge(answers, nodes, silent)
    order = list(dict.fromkeys(check.group for check in checks))
    return sorted(checks, key=lambda check: order.index(check.group)), others


def _result(checks: Sequence[Check]) -> dict[str, Any]:
    """What stands in preflight.json and under --json."""
    missed = [check for check in checks if check.verdict == MISS]
    status = DONE if not missed else HUNG if all(check.again for check in missed) else BAD_INPUT
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "verdict": worst(checks),
        "status": status,
        "checks": [check.row() for check in checks],
        "bad_nodes": sorted({node for check in missed for node in check.bad_nodes}),
    }


def _failure(checks: Sequence[Check]) -> Exception:
    """One line for what is missing; first what an operator has to mend."""
    missed = sorted((check for check in checks if check.verdict == MISS), key=lambda check: check.again)
    first, more = missed[0], len(missed) - 1
    text = f"{first.group}, {first.name}: {first.found}; {first.fix}" + (f" (and {more} more MISS above)" if more else "")
    return Hung(text) if first.again else InputError(text)


def _write(run_dir: Path, result: dict[str, Any]) -> None:
    try:
        write_atomically(run_dir / FILE, dump_json(result))
    except OSError as error:
        log(f"{run_dir / FILE} is not written: {one_line(error)}")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _report_first_rank(run_dir: Path, before: bytes | None, error: Exception) -> None:
    """Without rank 0: a line for each node, and preflight.json where rank 0, alive but out of reach, writes none."""
    from slurm.preflight.roll import expected_nodes

    if _local_rank() > 0:
        return
    log(f"preflight on {os.environ.get('SLURMD_NODENAME') or os.uname().nodename}: {one_line(error)}")
    time.sleep(3 + min(int(os.environ["RANK"]), 10) / 2)  # one after the other
    if _read(run_dir / FILE) == before:
        first = tuple(expected_nodes(int(os.environ["WORLD_SIZE"])))[:1]
        fix = "look for its error in the log and at its node"
        _write(run_dir, _result([Check("nodes", "ranks", MISS, one_line(error), fix, again=True, bad_nodes=first)]))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def _leave_within(seconds: float) -> None:
    """Whatever hangs, an open socket to a dead node for example, this process ends."""

    def give_up() -> None:
        log(f"preflight on {os.environ.get('SLURMD_NODENAME') or os.uname().nodename}: still not done after {seconds:g} s")
        leave(HUNG)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
