"""One fine-tuning run from a command line to its results file, which holds everything needed to repeat it.

    RESULTS/<task, "/" as "__">/<model>/seed-0.json    written last and atomically: if it is there, the run is whole
                                        seed-0.npz     logits and labels of dev and test, in the order of the CSV files

A run whose file is there is not done again; one that would differ from it is refused instead of overwriting it.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.cli import InputError, dump_json, log, write_atomically
from finetune.data import SPLITS, Task, Tokens, read_task, tokenize
from finetune.metrics import collapsed, cross_entropy, scores
from finetune.model import Classifier, build, encoder_sha256
from finetune.sources import open_source
from finetune.tasks import PUBLISHED, Settings, metric_of, settings_for
from finetune.train import predict, total_steps, train
from pretrain.implementations import choose_alone

FORMAT_VERSION = 1
REQUIRED = ("task", "metric", "model", "seed", "settings", "source", "data", "dev", "test", "collapsed", "predictions")


def run(
    model: str,
    task_folder: Path,
    out: Path,
    *,
    seed: int = 0,
    like: str | None = None,
    label: str | None = None,
    command: str | None = None,
    kernels: str = "auto",
    **changes: Any,
) -> dict[str, Any]:
    """Fine-tune and score one model on one task with one seed; return what `--json` prints.

    `changes` replace the task's own settings (`finetune.tasks.Settings`) where they are not None. `kernels` says who
    computes the fused operations (`kernels.choice`): auto, triton or torch.
    Raises InputError for bad input, RuntimeError when the loss is not a number; then no results file is written.
    """
    if not 0 <= seed < 1 << 63:
        raise InputError(f"--seed {seed}: must be from 0 to 2^63 - 1")
    if label is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", label):
        raise InputError(f"--label {label!r}: use letters, digits, '.', '_', '+', '-'; it names a folder")
    task = read_task(task_folder)
    settings = settings_for(task.name, **changes)
    total_steps(len(task.splits["train"].labels), settings)
    if task.name not in PUBLISHED:
        log(f"{task.name}: not a task of the benchmark, so the settings are general ones; check --epochs and the like")
    source = open_source(model, like, task.splits["train"].sequences)
    tokens = {
        split: tokenize(rows, source.tokenizer, source.config.vocab_size, settings.max_length)
        for split, rows in task.splits.items()
    }
    classifier = build(source.config, task.classes, source.weights, seed, source.where)
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "task": task.name,
        "metric": metric_of(task.name),
        "model": label or source.label,
        "seed": seed,
        "settings": settings.model_dump(),
        "source": {
            **source.about,
            "config": source.config.model_dump(),
            "encoder_sha256": encoder_sha256(classifier),
            "tokenizer_sha256": source.tokenizer_sha256,
        },
        "data": _describe_data(task_folder, task, tokens),
    }
    path = out / task.name.replace("/", "__") / result["model"] / f"seed-{seed}.json"
    done = _finished(path, result)
    if done is not None:
        log(f"{path}: this run is done already; its result stands")
        return _summary(done, path, already_done=True)
    _make_folder(path.parent)
    _report_input(task, tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = max(int(split.lengths.max()) for split in tokens.values())
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    names = choose_alone(source.config, device, dtype, longest, kernels)
    result["environment"] = _environment(device) | {"kernels": names}
    result["command"] = command
    _train_and_score(result, classifier.to(device), tokens, settings, seed, device, path)
    write_atomically(path, dump_json(result))
    log(_sentence(result))
    return _summary(result, path, already_done=False)


def _train_and_score(
    result: dict[str, Any],
    classifier: Classifier,
    tokens: Mapping[str, Tokens],
    settings: Settings,
    seed: int,
    device: torch.device,
    path: Path,
) -> None:
    """Train, score dev and test with the best weights, write the predictions and put everything into `result`."""
    started = time.monotonic()
    with _repeatable(device):
        trained = train(classifier, tokens["train"], tokens["dev"], settings, seed, device)
        logits = {split: predict(classifier, tokens[split], settings, device) for split in ("dev", "test")}
    for split, logits_nc in logits.items():
        labels = tokens[split].labels
        loss = cross_entropy(logits_nc, labels)
        if not math.isfinite(loss):
            raise RuntimeError(f"the {split} loss is {loss}; there is no score to report")
        result[split] = {"loss": loss, **scores(logits_nc, labels)}
    arrays: dict[str, Any] = {f"{split}_logits": values for split, values in logits.items()}
    arrays |= {f"{split}_labels": tokens[split].labels for split in logits}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    predictions = path.with_suffix(".npz")
    write_atomically(predictions, stream.getvalue())
    result |= {
        "predictions": predictions.name,
        "collapsed": collapsed(logits["test"]),
        "curves": trained.curves,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "train_tokens": trained.tokens,
        "train_seconds": round(trained.seconds, 3),
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),
        "seconds": round(time.monotonic() - started, 3),
    }


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Have CUDA add in the same order each time, as CPUs do; torch warns where it has no such implementation."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, at the first product
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _describe_data(folder: Path, task: Task, tokens: Mapping[str, Tokens]) -> dict[str, Any]:
    about: dict[str, Any] = {"folder": str(folder), "classes": task.classes}
    for split in SPLITS:
        rows = task.splits[split]
        letters, sequences = rows.other_letters()
        about[split] = {
            "rows": len(rows.labels),
            "rows_a_class": np.bincount(rows.labels, minlength=task.classes).tolist(),
            "sha256": rows.sha256,
            "tokens": len(tokens[split].ids),
            "longest": int(tokens[split].lengths.max()),  # tokens
            "truncated": tokens[split].truncated,  # sequences
            "other_letters": letters,  # than A, C, G, T
            "sequences_with_other_letters": sequences,
        }
    return about


def _report_input(task: Task, tokens: Mapping[str, Tokens]) -> None:
    counts = ", ".join(f"{split} {len(rows.labels):,}" for split, rows in task.splits.items())
    mean = len(tokens["train"].ids) / len(tokens["train"].labels)
    log(f"{task.name}: {task.classes} classes, rows: {counts}; {mean:.1f} tokens a sequence")
    for split, rows in task.splits.items():
        letters, sequences = rows.other_letters()
        if letters:
            log(f"{rows.path}: {letters:,} letters other than A, C, G, T in {sequences:,} sequences, fed as they are")
        if tokens[split].truncated:
            log(f"{rows.path}: {tokens[split].truncated:,} of {len(rows.labels):,} sequences truncated by --max-length")


def _finished(path: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result of this very run, or None; InputError if the file is of a run with other settings or data."""
    if not path.exists():
        return None
    stored = read_result(path)
    there, here = _identity(stored), _identity(json.loads(dump_json(result)))
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differing:
        details = ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in differing)
        raise InputError(f"{path}: is the result of another run, it differs in {details}; give another --out or --label")
    if not path.with_name(stored["predictions"]).is_file():
        log(f"{path}: its predictions file is gone, so the run is done again")
        return None
    return stored


def _identity(result: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run: where they agree here, so do their scores on one machine."""
    source, data = result["source"], result["data"]
    return {
        **result["settings"],
        **{f"model {key}": value for key, value in source["config"].items()},
        "task": result["task"],
        "seed": result["seed"],
        "encoder sha256": source["encoder_sha256"],
        "tokenizer sha256": source["tokenizer_sha256"],
        **{f"{split}.csv sha256": data[split]["sha256"] for split in SPLITS},
    }


def read_result(path: Path) -> dict[str, Any]:
    """Read a results file; InputError if it is not one."""
    try:
        result = json.loads(path.read_bytes())
        version = result["format_version"]
        missing = [key for key in REQUIRED if key not in result]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a results file of `finetune run`; remove it") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version {version}, this code reads {FORMAT_VERSION}; run it again elsewhere")
    if missing:
        raise InputError(f"{path}: not a whole results file, it has no {missing[0]!r}; remove it and run again")
    return dict(result)


def _summary(result: Mapping[str, Any], path: Path, already_done: bool) -> dict[str, Any]:
    return {
        "task": result["task"],
        "model": result["model"],
        "seed": result["seed"],
        "test_mcc": result["test"]["mcc"],
        "test_f1": result["test"]["f1_macro"],
        "test_accuracy": result["test"]["accuracy"],
        "dev_loss": result["dev"]["loss"],
        "dev_mcc": result["dev"]["mcc"],
        "best_step": result["best_step"],
        "steps": result["steps"],
        "collapsed": result["collapsed"],
        "tokens_per_second": result["tokens_per_second"],
        "seconds": result["seconds"],
        "already_done": already_done,
        "path": str(path),
    }


def _sentence(result: Mapping[str, Any]) -> str:
    text = (
        f"{result['task']}, {result['model']}, seed {result['seed']}: test MCC {result['test']['mcc']:.4f}, macro F1 "
        f"{result['test']['f1_macro']:.4f} with the weights of step {result['best_step']} of {result['steps']}, "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.1f} s"
    )
    return text + ("; COLLAPSED: one class is predicted throughout" if result["collapsed"] else "")


def _make_folder(folder: Path) -> None:
    """Make the results folder now, so that a run doesn't find out at its end that it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: results can't be written there: {error.strerror}") from None


def _environment(device: torch.device) -> dict[str, Any]:
    packages = ("numpy", "scikit-learn", "tokenizers", "torch")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if it was changed since; None outside a repository of its own."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere inside another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
