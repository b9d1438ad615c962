"""Rows of the preflight's table from the facts of all ranks (`facts`). Pure functions of what was found."""

from __future__ import annotations

import resource
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pretrain.config import Config
from slurm.preflight.check import MISS, OK, WARN, Check, listed
from slurm.preflight.facts import OPTIONAL, requirements

SLOW = 1.5  # times the median of all ranks for the same product
OTHERS_BYTES = 3e9  # in use on a GPU before training: more than a context and our product
FILES_A_RANK = 4  # sockets of stores and collectives
Facts = Mapping[int, Mapping[str, Any]]  # by rank, then by section
Nodes = Mapping[int, str]  # by rank


def judge(facts: Facts, nodes: Nodes, config: Config) -> list[Check]:
    """All rows but those of the network."""
    rows = [*packages(facts, nodes), *devices(facts, nodes), *limits(facts, nodes, config)]
    return rows + [*disks(facts, nodes), *dataset(facts, nodes)]


def silent(nodes: Nodes, places: Mapping[int, str]) -> Check:
    """The row for ranks that came and then never answered; `places`: where each of them stands."""
    where = listed(f"{nodes[rank]} rank {rank} (in {place})" for rank, place in places.items())
    fix = "a disk, driver or network of that node hangs: look there, or leave the node out"
    return Check(
        "nodes", "answers", MISS, f"no answer from {where}", fix, again=True, bad_nodes=_names(nodes[r] for r in places)
    )


def packages(facts: Facts, nodes: Nodes) -> list[Check]:
    """There, in the range of pyproject.toml, and the same on all ranks."""
    found, rows = _section(facts, nodes, "packages", "packages", 'pip install -e ".[triton]" in the environment of the job')
    if not found:
        return rows
    from packaging.requirements import Requirement  # deepspeed brings it; where it is missing there is nothing to judge
    from packaging.specifiers import SpecifierSet

    python, lines = requirements()
    ranges = {r.name: r.specifier for r in map(Requirement, lines) if r.marker is None or r.name in OPTIONAL}
    ranges["python"] = SpecifierSet(python)
    gpu = any(each.get("device", {}).get("visible") for each in facts.values())
    install = "install the same environment on every node, with the versions of constraints.txt"
    for name in next(iter(found.values())):
        versions = {rank: each.get(name) for rank, each in found.items()}
        if len(set(versions.values())) > 1:
            rows.append(Check("packages", name, MISS, "differs: " + _by_value(versions, nodes), install))
        elif (version := versions[min(versions)]) is None:
            if name not in OPTIONAL:
                rows.append(Check("packages", name, MISS, "is not installed", 'pip install -e "."'))
            elif name == "triton" and gpu:
                fix = 'pip install -e ".[triton]"; without it the fused kernels are PyTorch\'s, which are slower'
                rows.append(Check("packages", name, WARN, "is not installed", fix))
        elif version != "unknown" and not ranges.get(name, SpecifierSet()).contains(version, prereleases=True):
            rows.append(Check("packages", name, MISS, f"{version} is here, {name}{ranges[name]} is needed", install))
    if not rows:
        first = found[min(found)]
        shown = ("python", "torch", "deepspeed", "numpy", "safetensors", "tokenizers", "webdataset", *OPTIONAL)
        rows.append(Check("packages", "versions", OK, ", ".join(f"{name} {first.get(name) or '-'}" for name in shown)))
    return rows


def devices(facts: Facts, nodes: Nodes) -> list[Check]:
    """A GPU for every rank or for none, alike, free and right; and how fast each is."""
    found, rows = _section(facts, nodes, "device", "devices", "see there with nvidia-smi, or leave the node out", again=True)
    gpus = {rank: each for rank, each in found.items() if each["visible"]}
    without = [rank for rank in found if rank not in gpus]
    if not gpus:
        given, cuda = max((each["given"] for each in found.values()), default=0), [each["cuda"] for each in found.values()]
        if given:
            fix = f"torch is built for {f'CUDA {cuda[0]}' if cuda[0] else 'CPUs only'}: install another, or a newer driver"
            text = f"Slurm gives the job {given} GPUs a node, torch can use none"
            rows.append(Check("devices", "GPUs", MISS, text, fix))
        elif found:
            rows.append(Check("devices", "GPUs", OK, "none on any node: the run is for CPUs, over gloo"))
    elif without:
        bad = _names(nodes[rank] for rank in without)
        text = f"{len(gpus)} ranks have one, {len(without)} have none, on {listed(bad)}"
        rows.append(Check("devices", "GPUs", MISS, text, "nvidia-smi there says why", again=True, bad_nodes=bad))
    else:
        rows += _gpus(gpus, nodes)
    return rows + _products(found, nodes)


def _gpus(found: Facts, nodes: Nodes) -> list[Check]:
    rows: list[Check] = []
    short = [rank for rank, each in found.items() if each["index"] >= each["visible"]]
    most = max(each["visible"] for each in found.values())
    if short:
        lost = _names(nodes[rank] for rank in short if found[rank]["visible"] < most)
        text = "more ranks than GPUs: " + listed(f"{nodes[r]} rank {r} ({found[r]['visible']} visible)" for r in short)
        fix = f"the node lost one: leave {listed(lost)} out" if lost else "start one rank a GPU (RANKS_PER_NODE)"
        rows.append(Check("devices", "GPUs", MISS, text, fix, again=bool(lost), bad_nodes=lost))
        return rows
    names = {rank: each["name"] for rank, each in found.items()}
    ranks = Counter(nodes[rank] for rank in found)
    idle = {nodes[r]: each["visible"] for r, each in found.items() if each["index"] and each["visible"] > ranks[nodes[r]]}
    if len(set(names.values())) > 1:
        fix = "all wait for the slowest: ask for one model (--constraint or --gres)"
        rows.append(Check("devices", "GPUs", WARN, "several models: " + _by_value(names, nodes), fix))
    elif idle:
        text = listed(f"{node} has {count} GPUs for {ranks[node]} ranks" for node, count in idle.items())
        rows.append(Check("devices", "GPUs", WARN, text, "start one rank a GPU (RANKS_PER_NODE)"))
    else:
        rows.append(Check("devices", "GPUs", OK, f"{len(found)} x {names[min(names)]}"))
    used = {rank: each["used"] for rank, each in found.items() if each["used"] > OTHERS_BYTES}
    if used:
        text = "in use by others: " + listed(f"{nodes[r]} rank {r} {size / 1e9:.0f} GB" for r, size in used.items())
        rows.append(
            Check("devices", "GPU memory", WARN, text, "nvidia-smi there names the processes; end what is left over")
        )
    ecc = {nodes[rank]: each["ecc"] for rank, each in found.items() if each["ecc"]}
    if ecc:
        text = listed(f"{node} GPU {gpu}: {n}" for node, errors in ecc.items() for gpu, n in errors.items())
        fix = "ask for a reset of the GPU; where they grow, leave the node out"
        rows.append(Check("devices", "ECC errors", WARN, f"uncorrected: {text}", fix))
    return rows


def _products(found: Facts, nodes: Nodes) -> list[Check]:
    """Products of matrices: wrong ones, and ranks that are well over the median."""
    wrong = [rank for rank, each in found.items() if each.get("right") is False]
    if wrong:
        text = "is wrong on " + listed(f"{nodes[rank]} rank {rank}" for rank in wrong)
        bad = _names(nodes[rank] for rank in wrong)
        return [Check("devices", "product", MISS, text, "the device is broken", again=True, bad_nodes=bad)]
    seconds = {rank: each["seconds"] for rank, each in found.items() if "seconds" in each}
    if not seconds:
        return []
    middle = statistics.median_low(seconds.values())  # low: of two ranks the slow one is over it
    slow = {rank: value for rank, value in seconds.items() if value > SLOW * middle}
    text = f"right on all, {middle * 1e3:.1f} ms in the median"
    if not slow:
        return [Check("devices", "product", OK, f"{text}, {max(seconds.values()) * 1e3:.1f} at most")]
    who = listed(f"{nodes[rank]} rank {rank} {value * 1e3:.1f}" for rank, value in slow.items())
    fix = "all wait for the slowest: see there what else runs, clocks and temperature; leave the node out if it stays"
    return [Check("devices", "product", WARN, f"{text}; slow: {who}", fix)]


def limits(facts: Facts, nodes: Nodes, config: Config) -> list[Check]:
    """Limits of processes, and how many ranks there is work for."""
    found, rows = _section(facts, nodes, "limits", "nodes", "look at the node", again=True)
    gpu, several = any(each["device"].get("visible") for each in facts.values()), len(set(nodes.values())) > 1
    files = 512 + FILES_A_RANK * len(nodes)
    for name, least, fix in (
        ("open files", files, "ulimit -n in site_setup, or the limits of slurmd"),
        (
            "locked memory",
            resource.RLIM_INFINITY if gpu and several else 0,
            "InfiniBand needs LimitMEMLOCK=infinity of slurmd",
        ),
    ):
        low = [nodes[r] for r, each in found.items() if each[name] >= 0 and (least < 0 or each[name] < least)]
        if low:
            values = [each[name] for each in found.values() if each[name] >= 0]
            text = f"{min(values)} on {listed(low)}, {'unlimited' if least < 0 else least} would be enough"
            rows.append(Check("nodes", name, WARN, text, fix))
    if len(nodes) > config.train.global_batch_size:
        text = f"{len(nodes)} ranks share batches of {config.train.global_batch_size} sequences: some have nothing to do"
        rows.append(Check("nodes", "ranks and batch", WARN, text, "fewer ranks, or a larger train.global_batch_size"))
    return rows or [Check("nodes", "limits", OK, f"open files {listed(sorted({f['open files'] for f in found.values()}))}")]


def disks(facts: Facts, nodes: Nodes) -> list[Check]:
    """The run directory is one for all and has room; nodes have scratch."""
    found, rows = _section(facts, nodes, "run_dir", "disk", "give a run_dir on a disk that all nodes can write to")
    apart = [nodes[rank] for rank, each in found.items() if not each["seen"]]
    readonly = [nodes[rank] for rank, each in found.items() if each["seen"] and not each["writable"]]
    fix = "give a run_dir on a disk that all nodes mount and can write to"
    if apart:
        text = f"a file of rank 0 is not seen from {listed(apart)}"
        rows.append(Check("disk", "run_dir", MISS, text, fix))
    if readonly:
        rows.append(Check("disk", "run_dir", MISS, f"can't be written to from {listed(readonly)}", fix))
    if not rows:
        rows.append(Check("disk", "run_dir", OK, f"writable, and the same on {len(found)} node{'s' * (len(found) > 1)}"))
    rows += _room({0: facts[0]}, nodes) if 0 in found else []
    looked, failed = _section(facts, nodes, "scratch", "disk", "look at the disks of the node", again=True)
    rows += failed
    low = [
        f"{nodes[rank]}:{path} {disk['free'] / 1e9:.1f} GB free of {disk['needed'] / 1e9:g}"
        + ("" if disk["writable"] else ", not writable")
        for rank, disks in looked.items()
        for path, disk in disks.items()
        if disk["free"] < disk["needed"] or not disk["writable"]
    ]
    if low:
        rows.append(Check("disk", "scratch", WARN, listed(low), "clean up, or set LOCAL_SCRATCH and TMPDIR to another disk"))
    elif looked:
        least = min((disk["free"], path) for disks in looked.values() for path, disk in disks.items())
        rows.append(Check("disk", "scratch", OK, f"at least {least[0] / 1e9:.1f} GB free ({least[1]})"))
    return rows


def _room(facts: Facts, nodes: Nodes) -> list[Check]:
    found, rows = _section(facts, nodes, "room", "disk", "make run_dir a directory that can be written to")
    for each in found.values():
        gigabytes = f"the run still needs {each['needed'] / 1e9:.2f} GB, {each['free'] / 1e9:.2f} are free"
        fix = "make room, or keep fewer checkpoints (checkpoint.keep_last, keep_every)"
        if each["runs"]:
            text = f"{each['runs']} is running here"
            rows.append(Check("disk", "lease", MISS, text, "end it, or give another run_dir"))
        if each["free"] < each["needed"]:
            rows.append(Check("disk", "room", MISS, gigabytes, fix))
        elif each["reserved"] is False:
            rows.append(Check("disk", "room", MISS, f"{gigabytes}, but can't be had: {each['why']} (a quota?)", fix))
        elif each["reserved"] or each["runs"]:
            rows.append(Check("disk", "room", OK, gigabytes))
        else:
            rows.append(Check("disk", "room", OK, f"{gigabytes}; quotas were not checked: {each['why']}"))
        if each["inodes"] is not None and each["inodes"] < 1000 + 10 * len(nodes):
            rows.append(Check("disk", "inodes", MISS, f"{each['inodes']} files may still be made", "remove small files"))
    return rows


def dataset(facts: Facts, nodes: Nodes) -> list[Check]:
    """Readable from every node, the same everywhere, and what the run may go on with."""
    found, rows = _section(facts, nodes, "dataset", "dataset", "data.path must be there, and whole, on every node")
    sums = {rank: each["sha256"] for rank, each in found.items()}
    if len(set(sums.values())) > 1:
        short = {rank: f"manifest {value[:12]}" for rank, value in sums.items()}
        rows.append(
            Check("dataset", "manifest", MISS, "differs: " + _by_value(short, nodes), "copy the same dataset to all")
        )
    for each in found.values():
        if "refused" in each:
            rows.append(Check("dataset", "the run so far", MISS, each["refused"], "see the message"))
    if found and not rows:
        first = found[min(found)]
        text = f"{first['path']}: {first['sequences']:,} sequences, vocabulary {first['vocab_size']}"
        where = f"manifest {first['sha256'][:12]} on {len(found)} node{'s' * (len(found) > 1)}"
        rows.append(Check("dataset", "readable", OK, f"{text}; {where}"))
    return rows


def _section(
    facts: Facts, nodes: Nodes, section: str, group: str, fix: str, again: bool = False
) -> tuple[dict[int, Any], list[Check]]:
    """A section's facts of the ranks that have it; a row for each different way in which it failed on others."""
    here = {rank: each[section] for rank, each in facts.items() if section in each}
    failed = {rank: each["error"] for rank, each in here.items() if "error" in each}
    rows = []
    for error in dict.fromkeys(failed.values()):
        where = _names(nodes[rank] for rank, text in failed.items() if text == error)
        text = f"on {listed(where)}: {error}"
        rows.append(Check(group, section, MISS, text, fix, again, bad_nodes=where if again else ()))
    return {rank: each for rank, each in here.items() if rank not in failed}, rows


def _by_value(values: Mapping[int, Any], nodes: Nodes) -> str:
    """`2.10 on node1; 2.11 on node2, node3`, the most frequent first."""
    where: dict[Any, list[str]] = {}
    for rank, value in values.items():
        where.setdefault(value, []).append(nodes[rank])
    parts = sorted(where.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{value or 'none'} on {listed(_names(names))}" for value, names in parts)


def _names(names: Any) -> tuple[str, ...]:
    """Each once, in their order."""
    return tuple(dict.fromkeys(names))
