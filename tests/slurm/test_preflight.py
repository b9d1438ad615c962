"""`python -m slurm preflight`: real ranks over gloo, some missing, hanging or different; and how it judges links."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pretrain.config import load_config
from pretrain.plan import disk_bytes, steps_on_disk
from slurm.preflight.check import MISS, OK, WARN
from slurm.preflight.disk import room
from slurm.preflight.judge import devices, disks
from slurm.preflight.links import clock_offset, rounds, slow_links, slow_nodes
from slurm.preflight.links import judge as judge_network
from slurm.preflight.roll import hostnames
from tests.commands import ENVIRONMENT, ROOT

# The command with less patience, for what hangs for ever.
IMPATIENT = (
    "import slurm.preflight.verb as p; p.PART_SECONDS = 15.0; from data_prep.cli import leave, main; "
    "from slurm.__main__ import build_parser; leave(main(build_parser()))"
)


class Ended(NamedTuple):
    """How one rank ended."""

    status: int
    out: str
    err: str


def preflight(
    ranks: Sequence[int],
    size: int,
    *arguments: str,
    only: dict[int, list[str]] | None = None,
    env: dict[int, dict[str, str]] | None = None,
    command: Sequence[str] = ("-m", "slurm"),
) -> dict[int, Ended]:
    """Start `ranks` of `size`, each on a node of its own name; `only`: further arguments, `env`: variables of one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    place |= {"SLURM_STEP_NODELIST": f"node[1-{size}]", "SLURM_STEP_TASKS_PER_NODE": f"1(x{size})"}
    running = {}
    for rank in ranks:
        mine = {"RANK": str(rank), "SLURMD_NODENAME": f"node{rank + 1}"} | (env or {}).get(rank, {})
        words = [sys.executable, *command, "preflight", *arguments, *(only or {}).get(rank, [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running[rank] = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT | place | mine, text=True, **pipes)
    try:
        texts = {rank: process.communicate(timeout=120) for rank, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    return {rank: Ended(running[rank].returncode, *text) for rank, text in texts.items()}


def rows(ended: Ended) -> dict[str, dict[str, Any]]:
    """The rows by their names, of what --json printed."""
    assert ended.out, ended.err
    return {row["name"]: row for row in json.loads(ended.out.splitlines()[-1])["checks"]}


def test_ranks_that_would_train_pass_and_leave_only_the_report(tiny_dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = preflight([0, 1, 2], 3, "tiny", "--json", f"data.path={tiny_dataset}", f"run_dir={run_dir}")
    assert [each.status for each in ended.values()] == [0, 0, 0], ended
    assert (ended[1].out, ended[2].out) == ("", ""), "one result, however many ranks"
    found = rows(ended[0])
    assert {"ranks", "versions", "GPUs", "run_dir", "room", "readable", "all-reduce", "clocks"} <= set(found), ended[0].err
    assert all(row["verdict"] != MISS for row in found.values())
    assert "node3 (1)" in found["ranks"]["found"] and "OK" in ended[0].err
    assert [path.name for path in run_dir.iterdir()] == ["preflight.json"]
    assert json.loads((run_dir / "preflight.json").read_text()) == json.loads(ended[0].out)


def test_a_node_that_does_not_come_is_named_by_rank_0_alone(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = [f"data.path={tiny_dataset}", f"run_dir={tmp_path}"]
    ended = preflight([0, 1], 3, "tiny", *overrides, "--seconds-to-meet", "20", "--json")
    assert [each.status for each in ended.values()] == [70, 70], ended
    assert "node3 (1 of 1 ranks)" in rows(ended[0])["ranks"]["found"]
    assert json.loads((tmp_path / "preflight.json").read_text())["bad_nodes"] == ["node3"]
    assert "node3" not in ended[1].err and "MISS" not in ended[1].err


def test_without_rank_0_a_line_says_so_and_its_node_is_left_out(tiny_dataset: Path, tmp_path: Path) -> None:
    ended = preflight([1], 2, "tiny", f"data.path={tiny_dataset}", f"run_dir={tmp_path}", "--seconds-to-meet", "2")[1]
    assert ended.status == 70
    lines = ended.err.splitlines()
    assert len(lines) == 1 and "node2: rank 0" in lines[0], ended.err
    assert json.loads((tmp_path / "preflight.json").read_text())["bad_nodes"] == ["node1"]


def test_a_port_in_use_is_no_reason_to_leave_a_node_out(tiny_dataset: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {0: {"MASTER_PORT": str(taken.getsockname()[1])}}
        arguments = ["tiny", f"data.path={tiny_dataset}", f"run_dir={tmp_path}", "--seconds-to-meet", "5"]
        ended = preflight([0], 2, *arguments, env=env)
    assert ended[0].status == 70, ended
    assert "port" in ended[0].err and "in use" in ended[0].err.lower()
    assert json.loads((tmp_path / "preflight.json").read_text())["bad_nodes"] == []


def test_a_node_with_other_data_and_other_packages_has_to_be_mended(tiny_dataset: Path, tmp_path: Path) -> None:
    copy, packages = tmp_path / "copy", tmp_path / "packages"
    shutil.copytree(tiny_dataset, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest))  # without its indentation: not the same bytes
    old = packages / "deepspeed-0.15.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.15.0\n")
    ended = preflight(
        [0, 1],
        2,
        "tiny",
        "--json",
        f"run_dir={tmp_path / 'run'}",
        "train.global_batch_size=1",
        only={0: [f"data.path={tiny_dataset}"], 1: [f"data.path={copy}"]},
        env={1: {"PYTHONPATH": f"{packages}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}},
    )
    assert [each.status for each in ended.values()] == [2, 2], ended
    found = rows(ended[0])
    assert found["deepspeed"]["verdict"] == MISS and "0.15.0 on node2" in found["deepspeed"]["found"]
    assert found["manifest"]["verdict"] == MISS and "on node2" in found["manifest"]["found"]
    assert found["ranks and batch"]["verdict"] == WARN
    assert found["all-reduce"]["verdict"] == OK, "what an operator has to mend hides nothing else"
    assert json.loads(ended[0].out)["bad_nodes"] == [], "no node is at fault"
    assert "error: packages, deepspeed" in ended[0].err.splitlines()[-1]


def test_a_node_whose_disk_hangs_is_named_and_nobody_waits_for_it(tiny_dataset: Path, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    os.mkfifo(stuck / "manifest.json")  # to open it waits for a writer
    ended = preflight(
        [0, 1],
        2,
        "tiny",
        "--json",
        f"run_dir={tmp_path / 'run'}",
        only={0: [f"data.path={tiny_dataset}"], 1: [f"data.path={stuck}"]},
        command=("-c", IMPATIENT),
    )
    assert [each.status for each in ended.values()] == [70, 70], ended
    assert "node2 rank 1 (in dataset)" in rows(ended[0])["answers"]["found"]
    assert json.loads(ended[0].out)["bad_nodes"] == ["node2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def judged(run_dir: Path, needed: int) -> tuple[str, str]:
    """Verdict on a run directory's room, and what was found."""
    facts = {0: {"run_dir": {"seen": True, "writable": True}, "room": room(run_dir, needed)}}
    (check,) = [check for check in disks(facts, {0: "node1"}) if check.name == "room"]
    return check.verdict, check.found


def test_room_is_what_can_be_reserved_and_checkpoints_that_are_there_count(small_disk: Path) -> None:
    run_dir = small_disk / "run"
    assert judged(run_dir, 9 << 20)[0] == MISS
    assert judged(run_dir, 6 << 20)[0] == OK
    step = run_dir / "checkpoints" / "step-000000001"
    step.mkdir(parents=True)
    (step / "rank").write_bytes(bytes(5 << 20))
    assert judged(run_dir, 6 << 20)[0] == OK
    assert judged(run_dir, 9 << 20)[0] == MISS, "3 MB are free, 4 are missing"


def test_what_is_free_and_can_not_be_had_is_a_miss(tmp_path: Path) -> None:
    """As with a quota; here the limit is that of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        verdict, found = judged(tmp_path, 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert verdict == MISS and "File too large" in found
    assert judged(tmp_path, 2 << 20)[0] == OK
    assert list(tmp_path.iterdir()) == []


def gpu(**changes: Any) -> dict[str, Any]:
    """What a rank would say of a healthy GPU; no test has seen a real one."""
    facts = {"visible": 2, "index": 0, "given": 2, "cuda": "12.8", "name": "H100", "used": 6e8, "ecc": {}}
    return {"device": facts | {"right": True, "seconds": 0.002} | changes}


@pytest.mark.parametrize(
    ("last", "name", "verdict", "again", "bad_nodes"),
    [
        (gpu(index=1), "GPUs", OK, False, ()),
        (gpu(visible=0), "GPUs", MISS, True, ("node2",)),
        (gpu(visible=1, index=1), "GPUs", MISS, True, ("node2",)),
        (gpu(index=2), "GPUs", MISS, False, ()),  # more ranks than any node has GPUs: the job is wrong, not a node
        (gpu(name="A100"), "GPUs", WARN, False, ()),
        (gpu(used=40e9), "GPU memory", WARN, False, ()),
        (gpu(ecc={"1": 3}), "ECC errors", WARN, False, ()),
        (gpu(right=False), "product", MISS, True, ("node2",)),
        (gpu(seconds=0.004), "product", WARN, False, ()),
        ({"device": {"error": "CUDA error: an illegal instruction"}}, "device", MISS, True, ("node2",)),
    ],
)
def test_a_device_that_is_not_like_the_others_is_named(
    last: dict[str, Any], name: str, verdict: str, again: bool, bad_nodes: tuple[str, ...]
) -> None:
    nodes = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
    found = devices({0: gpu(), 1: gpu(index=1), 2: gpu(), 3: last}, nodes)
    (check,) = [check for check in found if check.name == name]
    assert (check.verdict, check.again, check.bad_nodes) == (verdict, again, bad_nodes), check
    assert verdict == OK or "node2" in check.found


def test_gpus_that_torch_can_not_use_are_not_mistaken_for_a_cpu_node() -> None:
    none = gpu(visible=0, cuda=None)
    (check, _) = devices({0: none, 1: none}, {0: "node1", 1: "node2"})
    assert check.verdict == MISS and not check.again and "CPUs only" in check.fix


def test_where_a_collective_breaks_the_few_are_the_suspects() -> None:
    nodes = {rank: f"node{rank + 1}" for rank in range(4)}
    lost = {0: {"error": "connection closed"}, 1: {"error": "connection closed"}, 2: {"error": "connection closed"}}
    assert judge_network(lost, nodes, {3: "the links"})[0].bad_nodes == ("node4",)
    assert judge_network({2: {"error": "NCCL error"}}, nodes, {0: "a", 1: "b", 3: "c"})[0].bad_nodes == ("node3",)
    assert judge_network({}, nodes, dict.fromkeys(nodes, "the all-reduce"))[0].bad_nodes == (), "nobody knows"


def ring(speeds: Sequence[float]) -> dict[tuple[str, str], float]:
    """Speeds of the links a-b, b-c, ... back to a."""
    names = "abcdefgh"[: len(speeds)]
    pairs = [(names[i], names[(i + 1) % len(speeds)]) for i in range(len(speeds))]
    return dict(zip(pairs, speeds, strict=True)) if len(speeds) > 2 else {("a", "b"): speeds[0]}


@pytest.mark.parametrize(
    ("speeds", "nodes", "links"),
    [
        ([1.0, 1.0], [], []),  # two nodes share one link: neither is slower
        ([1, 10, 1], ["a"], []),
        ([10, 10, 10], [], []),
        ([10, 1, 1, 10], ["c"], []),
        ([1, 1, 10, 1], ["a", "b"], []),  # two bad neighbours
        ([10, 10, 1, 10, 10, 10], [], ["c-d"]),  # the link, not its nodes
        ([10, 4, 5, 10, 9, 8], [], []),  # racks differ
    ],
)
def test_a_slow_node_is_told_from_a_slow_link(speeds: list[float], nodes: list[str], links: list[str]) -> None:
    measured = ring(speeds)
    assert list(slow_nodes(measured)) == nodes
    assert ["-".join(link) for link in slow_links(measured) if not set(link) & set(nodes)] == links


@pytest.mark.parametrize("count", range(9))
def test_no_node_times_two_links_at_once_and_every_link_is_timed(count: int) -> None:
    ends = [[end % count for link in links for end in (link, link + 1)] for links in rounds(count)]
    assert all(len(set(each)) == len(each) for each in ends)
    assert sorted(link for links in rounds(count) for link in links) == list(range({0: 0, 1: 0, 2: 1}.get(count, count)))


def test_clocks_are_compared_within_what_a_meeting_proves() -> None:
    """Ranks enter and leave late now and then; the offset of 3 s is found within its own bound."""
    true = [(0.0, 0.4, 0.5, 0.6), (1.0, 1.01, 1.02, 1.03), (2.9, 2.0, 3.0, 3.2)]  # a enters, b enters, a and b leave
    a = [(enter, leave) for enter, _, leave, _ in true]
    b = [(enter + 3, leave + 3) for _, enter, _, leave in true]
    offset, error = clock_offset(b, a)
    assert abs(offset - 3) <= error < 0.05


def test_slurms_lists_of_nodes_are_understood() -> None:
    assert hostnames("gpu[08-10,2],login1,r[1-2]n[9-10]") == (
        ["gpu08", "gpu09", "gpu10", "gpu2", "login1", "r1n9", "r1n10", "r2n9", "r2n10"]
    )


def test_the_disk_a_run_needs_counts_what_lies_there_at_once() -> None:
    base = ["run_dir=r", "data.path=d", "train.max_steps=10000", "checkpoint.save_every=1000"]
    config = load_config("dnabert2_117m", [*base, "checkpoint.keep_last=3", "checkpoint.keep_every=5000"])
    assert steps_on_disk(config) == 3 + 2 + 1
    assert disk_bytes(config) == 6 * 12 * 117_074_176 + (64 << 20)
    short = load_config("dnabert2_117m", [*base, "checkpoint.keep_last=3", "train.max_steps=1500"])
    assert steps_on_disk(short) == 2, "it saves twice"
