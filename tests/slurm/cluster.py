"""A throwaway Slurm on this machine: munged, slurmctld and one slurmd a node, all as children of the test process.

Everything lies in one temporary directory: configuration, state, logs, a munge key made on the spot and munge's socket.
Every listening socket is bound to loopback, and `start` checks that it is: an open slurmctld runs commands as root for
whoever holds the key. Nothing of a Slurm that may already run here is read or touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Debian puts the daemons where an ordinary user's PATH doesn't look.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "setpriv", "unshare"]
# Runs a command where the machine is called localhost. With NoInAddrAny, Slurm listens on the address of the machine's
# name and nowhere else; this makes it 127.0.0.1 wherever we are, for daemons, jobs and commands alike.
NAMED_LOCALHOST = ["unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$@"', "sh"]
# PREEMPTED, because preempted jobs are queued again here; SIGNALING, because signals come before that (squeue's manual).
LIVE_STATES = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SIGNALING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "STOPPED",
    "PREEMPTED",
}

CONFIG = """\
ClusterName=throwaway
# Listen on the address of the machine's name only (see NAMED_LOCALHOST); by default it is every interface.
SlurmctldHost=localhost
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
# Jobs derive their ports from their ids: another cluster on this machine must have others.
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credential of its last life has expired: two minutes by default.
AuthInfo=socket={dir}/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmdSpoolDir={dir}/%n
# No cgroups, no affinity, no accounting: containers have none of what these need.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes have the CPUs that are written below, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=10
SlurmdTimeout=60
# Jobs in `urgent` push those in `main` out, with half a minute's notice.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def unavailable() -> str | None:
    """The reason why a cluster cannot be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts jobs only as root"
    if subprocess.run([*NAMED_LOCALHOST, "true"], capture_output=True).returncode != 0:
        return "not allowed to make a namespace for the host name (in a container: --cap-add SYS_ADMIN)"
    return None


class SlurmCluster:
    """Use as a context manager; `run` then runs any Slurm command against this cluster."""

    def __init__(self, nodes: tuple[str, ...] = ("node1", "node2"), cpus: int = 4) -> None:
        self.nodes, self.cpus = nodes, cpus
        # Not pytest's tmp_path: the paths of Unix sockets in it must stay below 108 characters.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.dir.chmod(0o711)  # munged insists that its socket can be reached by all
        self.config = self.dir / "slurm.conf"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(self.config)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        key = self.dir / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.dir / "state").mkdir()
        ports = free_ports(1 + len(self.nodes))
        lines = [CONFIG.format(dir=self.dir, port=ports[0], first_job=random.randint(1, 2_000_000))]
        for node, port in zip(self.nodes, ports[1:], strict=True):
            (self.dir / node).mkdir()
            where = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName={node} {where} CPUs={self.cpus} State=UNKNOWN\n")
        self.config.write_text("".join(lines))

        munge_files = [f"--{name}-file={self.dir}/munge.{name}" for name in ("pid", "log", "seed")]
        self._spawn("munged", "--foreground", f"--key-file={key}", f"--socket={self.dir}/munge.socket", *munge_files)
        wait_until(lambda: (self.dir / "munge.socket").is_socket(), 10, "munged's socket", self.logs)
        self._spawn("slurmctld", "-D", "-f", str(self.config))
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

        listening = self.listening()
        assert len(listening) >= 1 + len(self.nodes), f"expected a port a daemon, found {listening}"
        assert all(address == "127.0.0.1" for address, _ in listening), f"not only on loopback: {listening}"

    def start_node(self, node: str) -> None:
        self._spawn(node, "-D", "-N", node, "-f", str(self.config), program="slurmd")

    def kill_node(self, node: str) -> None:
        """What a power cut does to a node: its slurmd and all that runs there are gone at once."""
        daemon = self.daemons.pop(node)
        tasks = self._processes(f"SLURMD_NODENAME={node}")
        # A slurmstepd has neither variable, but it is the parent of what runs on its node.
        steps = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in tasks}
        steps = {pid for pid in steps if Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")}
        for pid in [daemon.pid, *steps, *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def wait_for_nodes(self) -> None:
        """Returns when no node has anything to do."""
        wait_until(self._all_idle, 60, "every node to be idle", self.logs)

    def stop(self) -> None:
        """Ends the jobs, then the daemons, and nothing else."""
        try:
            if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
                self.run("scancel", "--user=root", check=False)
                deadline = time.monotonic() + 20
                while time.monotonic() < deadline and self.run("squeue", "--noheader", check=False).stdout.strip():
                    time.sleep(0.2)
        finally:
            for daemon in reversed(self.daemons.values()):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            # A job's processes are no children of ours, but they carry the path of our configuration.
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.dir, ignore_errors=True)

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a Slurm command (or any other) against this cluster."""
        return subprocess.run(
            [*NAMED_LOCALHOST, *command], env=self.env | env, check=check, text=True, capture_output=True, timeout=60
        )

    def submit(self, *arguments: str, **env: str) -> str:
        """Submits with sbatch, the output going where `log` finds it, and returns the job's id."""
        output = f"--output={self.dir}/job-%j.out"
        done = self.run("sbatch", "--parsable", output, *arguments, check=False, **env)
        assert done.returncode == 0, f"sbatch: {done.stderr}"
        return done.stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol knows about a job: JobState, ExitCode, Restarts ..."""
        words = self.run("scontrol", "show", "job", "-o", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, timeout: float = 300) -> dict[str, str]:
        """Waits for the end of a job; the caller judges by JobState."""
        job = self.job(job_id)
        deadline = time.monotonic() + timeout
        while job["JobState"] in LIVE_STATES:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job_id} has not ended after {timeout:.0f} s\n{self.log(job_id)}")
            time.sleep(0.3)
            job = self.job(job_id)
        return job

    def log(self, job_id: str) -> str:
        """The job's state and its output, for the message of a failing test."""
        job = self.job(job_id)
        path = self.dir / f"job-{job_id}.out"
        text = path.read_text(errors="replace") if path.exists() else "(no output)"
        return f"job {job_id}: {job['JobState']}, exit code {job['ExitCode']}, {job['Restarts']} restarts\n{text}"

    def logs(self) -> str:
        """The last lines of every daemon."""
        tails = [f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(self.dir.glob("*.log"))]
        return "\n".join(tails)

    def listening(self) -> list[tuple[str, int]]:
        """Address and port of every TCP socket that a process of this cluster listens on."""
        inodes = set()
        for pid in {d.pid for d in self.daemons.values()} | set(self._processes()):
            for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    inodes.add(os.readlink(descriptor))
                except OSError:  # closed meanwhile
                    continue
        found = []
        for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
            if not Path(table).exists():
                continue
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    address, port = fields[1].split(":")
                    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                    found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
        return found

    def _spawn(self, name: str, *arguments: str, program: str | None = None) -> None:
        # A child of ours that dies with us, even if we are killed.
        command = ["setpriv", "--pdeathsig", "KILL", *NAMED_LOCALHOST, program or name, *arguments]
        with open(self.dir / f"{name}.log", "wb") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def _all_idle(self) -> bool:
        dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
        if dead:
            raise AssertionError(f"{', '.join(dead)} ended at once\n{self.logs()}")
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _processes(self, *variables: str) -> list[int]:
        """Whatever runs with the path of our configuration, and these too, in its environment."""
        marks = {f"SLURM_CONF={self.config}".encode(), *(variable.encode() for variable in variables)}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marks <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
            except OSError:  # ended meanwhile
                continue
        return found


def wait_until(condition: Callable[[], bool], timeout: float, what: str, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s for {what}\n{explain()}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Different ports that are free now; all are held until the last is known."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
