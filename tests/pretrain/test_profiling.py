"""Profiles of real processes, and the arithmetic on traces made by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.profiling import Profile, summarize, union_length
from tests.commands import python


def profiled(run_dir: Path, trained: int, *, ranks: int = 2, collective: bool = True) -> dict[str, Any]:
    """The summary of a run of so many steps, and that nothing but it and the trace was written."""
    worker = Path(__file__).with_name("profiling_worker.py")
    done = python(worker, run_dir, str(trained), "collective" if collective else "alone", ranks=ranks)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((run_dir / "profile" / "summary.json").read_text())
    assert {path.name for path in (run_dir / "profile").iterdir()} == {"summary.json", summary["trace"]}
    assert "profile of steps" in done.stderr
    return summary


def test_two_ranks_that_talk_leave_a_trace_and_the_share_of_it(tmp_path: Path) -> None:
    summary = profiled(tmp_path, trained=7)
    assert summary["trace"] == "rank-00000-steps-10-11.json.gz"
    assert (summary["first_step"], summary["last_step"]) == (10, 11)
    assert 0 < summary["share_of_communication"] < 1 and summary["seconds"] > 0
    events = json.loads(gzip.decompress((tmp_path / "profile" / summary["trace"]).read_bytes()))["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("aten::mm") == names.count("gloo:all_reduce") == 2


def test_without_collectives_nothing_is_communication_and_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path) -> None:
    summary = profiled(tmp_path, trained=3, ranks=1, collective=False)
    assert (summary["first_step"], summary["last_step"]) == (10, 10)
    assert summary["share_of_communication"] == 0
    assert "share_of_exposed_communication" not in summary


def test_the_union_counts_what_overlaps_once() -> None:
    assert union_length([]) == 0
    assert union_length([(5, 7), (0, 2), (1, 3), (1, 2), (3, 4), (6, 6.5)]) == 6  # 0 to 4 and 5 to 7
    assert union_length([(3, 1), (1, 2)]) == 1


def event(category: str, name: str, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start}


def test_on_a_gpu_only_what_no_kernel_hides_is_exposed() -> None:
    kernel = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    summary = summarize(
        [
            {"ph": "M", "name": "process_name"},
            event("user_annotation", "ProfilerStep#2", 100, 200),
            event("gpu_user_annotation", "ProfilerStep#2", 110, 900),
            event("user_annotation", "ProfilerStep#3", 200, 300),
            event("kernel", kernel, 90, 140),  # 40 of it in the profile
            event("kernel", kernel, 120, 160),  # of another stream: 20 more
            event("user_annotation", "nccl:all_reduce", 100, 300),  # only the call
            event("gpu_user_annotation", "nccl:all_reduce", 100, 300),
            event("kernel", "ampere_bf16_s16816gemm", 130, 150),  # hides 20 of the 60
            event("kernel", "ampere_bf16_s16816gemm", 180, 260),
        ]
    )
    assert summary["seconds"] == pytest.approx(200e-6)
    assert summary["share_of_communication"] == pytest.approx(0.3)
    assert summary["share_of_exposed_communication"] == pytest.approx(0.2)


def test_a_run_that_ends_before_its_profile_leaves_nothing(tmp_path: Path) -> None:
    profile = Profile(tmp_path, rank=0, first_step=1, steps=2)
    for step in (1, 2):
        profile.step_done(step)
    profile.close()
    assert not any(tmp_path.iterdir())
