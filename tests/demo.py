"""`make demo`: the whole path on two processes, from genomes to a scored checkpoint, with a kill in the middle.

Each step is one command of the README, printed before it runs. Without arguments it works on small synthetic genomes;
`--genomes DIR --gue DIR` runs it on real ones. Everything is written below `demo/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RANKS = 2
# One thread a rank: more threads than cores stall each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
KILL_AFTER_STEP = 130  # between two checkpoints (tiny saves every 100), so some steps are lost and done again
# Small datasets of GUE that fine-tune within a minute; the first one that is there is used.
TASKS = ("mouse/3", "prom/prom_core_tata", "mouse/0", "tf/0", "synthetic/motif")


def run(*commands: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Run `python -m COMMAND --json` side by side and return what each printed; a failure ends the demo with its status."""
    started = []
    for arguments in commands:
        command = [sys.executable, "-m", *map(str, arguments), "--json"]
        show(command)
        started.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode != 0:
            sys.exit(process.returncode)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def show(command: Sequence[str]) -> None:
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)


def training_command(arguments: Sequence[str]) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["torch.distributed.run", f"--nproc_per_node={RANKS}", f"--master_port={port}"]
    return [sys.executable, "-m", *launcher, "-m", "pretrain", "train", *arguments]


def train_until_killed(arguments: Sequence[str], run_dir: Path) -> int:
    """Start training and kill every process of it with SIGKILL once KILL_AFTER_STEP is logged; returns the last step."""
    command = training_command(arguments)
    show(command)
    launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    try:
        while last_step(run_dir) < KILL_AFTER_STEP:
            if launcher.poll() is not None:
                sys.exit(launcher.returncode or 1)
            time.sleep(0.2)
        step = last_step(run_dir)
    finally:
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()
        launcher.wait()
    print(f"--- killed with SIGKILL after step {step}; the same command again:", flush=True)
    return step


def last_step(run_dir: Path) -> int:
    records = metrics(run_dir)
    return int(records[-1]["step"]) if records else 0


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def choose_task(gue: Path) -> Path:
    for name in TASKS:
        if all((gue / name / f"{split}.csv").is_file() for split in ("train", "dev", "test")):
            return gue / name
    sys.exit(f"{gue}: none of {', '.join(TASKS)} is there with train.csv, dev.csv and test.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genomes", type=Path, help="folder of FASTA files (default: synthetic)")
    parser.add_argument("--gue", type=Path, help="folder of GUE datasets (default: a synthetic task)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="emptied first")
    parser.add_argument("--steps", type=int, default=600, help="of pre-training")
    args = parser.parse_args()
    started = time.monotonic()
    out: Path = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    genomes, gue = (path.resolve() if path else None for path in (args.genomes, args.gue))
    real = genomes is not None
    if genomes is None or gue is None:
        run(["data_prep", "synthesize", "--out", out / "synthetic"])
        genomes, gue = genomes or out / "synthetic" / "genomes", gue or out / "synthetic" / "gue"
    tokenizer, dataset, run_dir = out / "tokenizer.json", out / "dataset", out / "run"
    # Larger vocabularies are for larger models and budgets: see the preset.
    sample = ["--vocab-size", "256", "--sample-bases", "8000000"]
    run(["data_prep", "tokenizer", "--genomes", genomes, "--out", tokenizer, *sample])
    # Synthetic contigs are short: smaller regions, so that some of them fall into the validation split.
    regions = [] if real else ["--region-bases", "20000", "--valid-fraction", "0.05"]
    (sharded,) = run(["data_prep", "shard", "--genomes", genomes, "--tokenizer", tokenizer, "--out", dataset, *regions])

    training = ["tiny", f"run_dir={run_dir}", f"data.path={dataset}", f"data.tokenizer={tokenizer}"]
    training += [f"train.max_steps={args.steps}"]
    killed_at = train_until_killed(training, run_dir)
    command = training_command(training)
    show(command)
    if (status := subprocess.run(command, cwd=ROOT, env=ENVIRONMENT).returncode) != 0:
        sys.exit(status)

    exported = out / "hf"
    run(["pretrain", "export", run_dir, "--out", exported])
    task, results = choose_task(gue), out / "results"
    # The published learning rate, 3e-5, is for 117M parameters.
    tuning = ["--task", task, "--out", results, "--learning-rate", "1e-3", "--max-steps", "400", "--eval-every", "50"]
    pretrained, random = run(
        ["finetune", "run", "--model", exported, *tuning],
        ["finetune", "run", "--model", "random", "--like", exported, *tuning],
    )
    run(["finetune", "report", results, "--out", out / "report"])

    records = metrics(run_dir)
    speeds = sorted(record["tokens_per_second"] for record in records)
    tokens = sharded["tokens"]
    print(
        f"""
================ summary ================
bases read         {sharded["bases_in"]:>14,}   kept {sharded["bases_kept"]:,}
tokens             {tokens["train"] + tokens["valid"]:>14,}   train {tokens["train"]:,}, valid {tokens["valid"]:,}
steps              {records[-1]["step"]:>14,}   on {RANKS} processes, killed after step {killed_at} and resumed
loss, first        {records[0]["loss"]:>14.4f}
loss, last         {records[-1]["loss"]:>14.4f}   validation {records[-1].get("validation_loss", float("nan")):.4f}
tokens a second    {speeds[len(speeds) // 2]:>14,.0f}   median of training
MCC pre-trained    {pretrained["test_mcc"]:>14.4f}   {task.parent.name}/{task.name}, test split, seed 0
MCC random         {random["test_mcc"]:>14.4f}   the same encoder without pre-training (one seed: no proof)
seconds            {time.monotonic() - started:>14,.0f}   everything is in {out}"""
    )


if __name__ == "__main__":
    main()
