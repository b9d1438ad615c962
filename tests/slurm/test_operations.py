"""docs/operations.md: every command of the page, run in its order by an operator of the throwaway cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.slurm.cluster import NAMED_LOCALHOST, SlurmCluster, wait_until

PAGE = ROOT / "docs" / "operations.md"
# A block is run when no job is left; with such a remark before it, while one is at work, or can't start.
BLOCK = re.compile(r"(?:<!-- while it (runs|waits) -->\n)?```sh\n(.*?)```", re.DOTALL)
# The situation in which the page says how to get a job going that has left out too many nodes.
LEFT_OUT = """
job=$(sbatch --parsable --hold --nodes=2 --output=/dev/null --wrap=true)
scontrol update JobId="$job" ExcNodeList=node1
scontrol release "$job"
"""
COMMAND = re.compile(r"`((?:python -m|sbatch|scancel|scontrol|slurm/pipeline\.sh|squeue|srun) [^`]+)`")  # in a sentence
END = "--- end of the block ---"


class Operator:
    """A bash in a copy of the repository, with a home of its own; it ends where a command fails."""

    def __init__(self, cluster: SlurmCluster, home: Path) -> None:
        self.cluster, self.home, self.run_dir = cluster, home, home / "dnabert2-try" / "run"
        repository = home / "repository"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
            if (ROOT / name).is_file():
                (repository / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, repository / name)
        (repository / ".venv").symlink_to(sys.prefix)
        with (repository / "slurm" / "site.env").open("a") as site:  # what this site has to say: nodes without memory
            site.write(f"export SBATCH_MEM_PER_NODE=0 LOCAL_SCRATCH={home}/scratch\n")
        (home / "scratch").mkdir()
        self.bash = subprocess.Popen(
            [*NAMED_LOCALHOST, "bash", "--noprofile", "--norc", "-e", "-o", "pipefail"],
            cwd=repository,
            env=cluster.env | {"HOME": str(home)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, commands: str) -> str:
        """What they print; all must succeed, within a minute."""
        assert self.bash.stdin and self.bash.stdout
        block = self.home / "block"
        block.write_text(commands)
        self.bash.stdin.write(f"source {block} </dev/null\necho '{END}'\n")
        self.bash.stdin.flush()
        timer = threading.Timer(60, self.bash.kill)
        timer.start()
        printed: list[str] = []
        for line in self.bash.stdout:
            if line == f"{END}\n":
                timer.cancel()
                return "".join(printed)
            printed.append(line)
        timer.cancel()
        raise AssertionError(f"{commands}\nfailed:\n{''.join(printed)}\n{self.explain()}")

    def job(self) -> str:
        """What the page's `job` is now."""
        return self.run('echo "${job:-}"').strip()

    def blocks(self) -> Iterator[tuple[str, str, str]]:
        """Run the page: of each block the commands, what they printed, and `job` then."""
        for when, commands in BLOCK.findall(PAGE.read_text()):
            if when == "runs":
                wait_until(self.at_work, 60, "a job that runs", self.explain)
            else:
                self.wait_for_all()
            if when == "waits":
                self.run(LEFT_OUT)
                wait_until(lambda: "BadConstraints" in self.cluster.run("squeue").stdout, 30, "no node", self.explain)
            yield commands, self.run(commands), self.job()
        self.wait_for_all()

    def wait_for_all(self) -> None:
        wait_until(lambda: not self.cluster.run("squeue", "--noheader").stdout, 300, "all jobs to end", self.explain)

    def at_work(self) -> bool:
        """The page's `job` has begun to train, and come further than the step to which it is to go back."""
        log = self.home / "repository" / f"pretrain-{self.job()}.out"
        steps = re.findall(r"^step (\d+)/", log.read_text() if log.exists() else "", re.MULTILINE)
        return len(steps) > 1 and int(steps[-1]) > 6

    def exit(self) -> tuple[int, int]:
        """Status and step of exit.json."""
        end = json.loads((self.run_dir / "exit.json").read_text())
        return end["status"], end["checkpoint_step"]

    def explain(self) -> str:
        files = [*self.home.glob("repository/*.out"), *self.home.glob("dnabert2-try/try/logs/*.out")]
        texts = [f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files]
        return self.cluster.run("squeue").stdout + "\n".join(texts)


@pytest.mark.slurm
def test_every_command_of_the_page_works(cluster: SlurmCluster, tmp_path: Path) -> None:
    operator = Operator(cluster, tmp_path)
    home, run_dir = tmp_path / "dnabert2-try", operator.run_dir
    printed: dict[str, str] = {}
    for commands, output, job in operator.blocks():
        first = commands.split("\n")[0].split("  ")[0]
        printed[first] = output
        if first == 'scontrol update JobId="$job" Requeue=0':
            stopped = job
        elif first == 'cat "$RUN_DIR/exit.json"':
            status, step = operator.exit()
            shown = cluster.job(stopped)
            assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "75:0", "0"), operator.explain()
            assert status == 75 and f"{step:>10}   2 ranks" in output
        elif first == 'scancel "$job"':
            cancelled = job
            operator.wait_for_all()
            assert operator.exit()[0] == 75 and operator.exit()[1] > step
            assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("CANCELLED", "0"), operator.explain()
        elif first == 'squeue --jobs="$job" --format="%i %T %r"':
            assert "ExcNodeList=node1" in output
            left_out = job

    assert "all is done" in printed['cat "$WORK/try/report/table.md"']
    assert "synthetic/motif" in printed['cat "$WORK/try/report/table.md"']
    assert "running" in printed["squeue --me"]
    assert operator.exit() == (0, 8), operator.explain()
    lives = [json.loads(line) for line in (run_dir / "lives.jsonl").read_text().splitlines()]
    assert [(life["job"] in (stopped, cancelled), life["ranks"], life["from_step"]) for life in lives] == [
        (True, 2, 0),
        (True, 1, step),
        (False, 1, 5),
    ]
    assert (home / "hf" / "config.json").is_file() and (home / "curves.png").is_file()
    assert "synthetic/motif" in (home / "report" / "table.md").read_text()
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == ["step-000000008"]
    assert cluster.job(left_out)["JobState"] == "COMPLETED"


def test_no_command_of_the_page_stands_where_it_is_not_run() -> None:
    text = PAGE.read_text()
    assert COMMAND.findall(BLOCK.sub("", text)) == []
    assert text.count("```") == 2 * len(BLOCK.findall(text))


def test_links_and_tables_of_the_page_are_whole() -> None:
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line[:1] == "#"
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        assert (PAGE.parent / file).is_file() if file else anchor in anchors, link
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_limits_on_the_page_are_those_of_the_site_settings() -> None:
    site = (ROOT / "slurm" / "site.env").read_text()
    for name, number in re.findall(r"`([A-Z_]+)` \((\d+)", PAGE.read_text()):
        assert f"{name}=${{{name}:-{number}}}" in site, name
