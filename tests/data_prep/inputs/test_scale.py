"""Genomes as large as they come: memory stays small, and positions beyond 32 bits are right."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep.inputs.genomes import read_regions
from tests.commands import ENVIRONMENT, ROOT

# The command, which then tells the most memory that the process, or one that it started, ever held. VmHWM and not ru_maxrss,
# which counts what this process held when it started that one.
SHARD = """
import re, resource, sys
from pathlib import Path
from data_prep.__main__ import run
status = run(sys.argv[1:])
own = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""


@pytest.mark.parametrize(("gigabases", "width"), [(3.0, 80), (2.2, 0)])
def test_a_record_of_gigabases(tmp_path: Path, gigabases: float, width: int) -> None:
    """Never on disk as a whole: the same gzip member of Ns again and again, with bases before and behind."""
    line = b"N" * (width or 4_000_000) + b"\n" * bool(width)
    member = gzip.compress(line * (4_000_000 // (width or 4_000_000)), 1)  # unpacks faster than level 9
    count = int(gigabases * 1e9) // 4_000_000
    path = tmp_path / "x.fa.gz"
    first, last = b"ACGTA", b"GATTACA" * 1000
    with path.open("wb") as stream:
        stream.write(gzip.compress(b">early\nACGT\n>long\n" + first))
        for _ in range(count):
            stream.write(member)
        stream.write(gzip.compress(last + b"\n>late\nAC\n"))
    length = len(first) + count * 4_000_000 + len(last)
    assert length > 1 << 31
    total, tail = 0, b""
    tracemalloc.start()
    for region in read_regions(path):
        if region.name == "long":
            assert (region.record, region.start, region.number) == (1, total, total // 1_000_000)
            total, tail = total + len(region.bases), (tail + region.bases)[-len(last) - 9 :]
            assert total > 1_000_000 or region.bases[:7] == b"ACGTANN"
        else:
            assert (region.name, region.start, region.number) in (("early", 0, 0), ("late", 0, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (total, tail) == (length, b"N" * 9 + last)
    assert peak < 16e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["wrapped", "one line, gzip"])
def test_memory_of_a_task_with_a_record_of_250_mb(tmp_path: Path, tokenizer_file: Path, form: str) -> None:
    """The last task reads everything before its own unit."""
    (tmp_path / "genomes").mkdir()
    path = tmp_path / "genomes" / ("x.fa" if form == "wrapped" else "x.fa.gz")
    letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(0, 4, 25_000_000)]
    if form == "wrapped":
        lines = np.full((len(letters) // 80, 81), ord("\n"), np.uint8)
        lines[:, :80] = letters.reshape(-1, 80)
        header, text = b">long\n", lines.tobytes()
    else:
        header, text = gzip.compress(b">long\n"), gzip.compress(letters.tobytes(), 1)
    with path.open("wb") as stream:
        stream.write(header)
        for _ in range(10):
            stream.write(text)
    arguments = ["shard", "--genomes", tmp_path / "genomes", "--tokenizer", tokenizer_file, "--out", tmp_path / "out"]
    task = ["--unit-bases", "5000000", "--num-tasks", "50", "--task", "49", "--json"]
    command = [sys.executable, "-c", SHARD, *arguments, *task]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result, kilobytes = done.stdout.splitlines()
    assert json.loads(result)["bases_in"] == 5_000_000
    assert int(kilobytes) < 600_000
