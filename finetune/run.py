"""One fine-tuning run from a command line to its results file, which holds everything needed to repeat it.

A run whose file is there is not done again; one that would differ from it is refused instead of overwriting it. What the
files are is said in `finetune/results.py`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_prep.cli import InputError, dump_json, log, write_atomically
from finetune.baselines import CHANNELS, DILATIONS, KMER_BASES, WIDTH, base_tokenizer, build_cnn, kmer_counts
from finetune.data import Columns, Task, read_task
from finetune.environment import environment
from finetune.export import export_classifier, run_of
from finetune.folders import SPLITS
from finetune.leaks import leaked
from finetune.linear import PENALTIES, fit_linear
from finetune.lora import add_lora, merge_lora
from finetune.metrics import Objective
from finetune.model import Classifier, build, encoder_sha256
from finetune.results import (
    CNN,
    FORMAT_VERSION,
    KMER,
    failed_path,
    fingerprint,
    is_deterministic,
    label_of,
    method_of,
    read_result,
    relevant,
    result_path,
    same_run,
    whole_predictions,
)
from finetune.sources import Source, open_source
from finetune.tasks import PUBLISHED, Protocol, Settings, metric_of, settings_for
from finetune.tokens import Tokens, tokenize
from finetune.train import embed, fitting_warmup, predict, total_steps, train
from kernels import MAX_SEQUENCE
from pretrain.implementations import choose_alone


@dataclass(frozen=True)
class Prepared:
    """A run before anything is computed."""

    task: Task
    settings: Settings
    objective: Objective
    seed: int
    source: Source | None  # None: a baseline
    tokens: dict[str, Tokens]  # of train, dev and test; empty for k-mer counts
    model: nn.Module | None  # None for k-mer counts


def run(
    model: str,
    task_path: Path,
    out: Path,
    *,
    seed: int = 0,
    like: str | None = None,
    label: str | None = None,
    method: str | None = None,
    protocol: Protocol = "strict",
    columns: Columns | None = None,
    command: str | None = None,
    kernels: str = "auto",
    export: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Fine-tune and score one model on one task with one seed; return what `--json` prints.

    Args:
        model: a checkpoint, `random`, or a baseline: `kmer`, `cnn`.
        task_path: a folder of train.csv, dev.csv, test.csv, or one CSV file.
        kernels: who computes the fused operations (`kernels.choice`): auto, triton or torch.
        export: write the fine-tuned model there as a Hugging Face directory; then a run that is done is done again.
        changes: replace the protocol's settings (`finetune.tasks.Settings`) where they are not None.

    Raises InputError for bad input, RuntimeError when the loss is not a number; then no results file is written.
    """
    if not 0 <= seed < 1 << 63:
        raise InputError(f"--seed {seed}: must be from 0 to 2^63 - 1")
    method = method_of(model, method)
    name = label_of(model, like, label, method, changes.get("pooling"))
    task = read_task(task_path, columns)
    settings = settings_for(task.name, protocol, method=method, **changes)
    given = {key for key, value in changes.items() if value is not None}
    settings, shortened = fitting_warmup(settings, len(task.splits["train"].labels), given)
    given |= shortened
    if export is not None and method not in ("full", "lora"):
        raise InputError(f"--export goes with fine-tuning (--method full or lora); {method} leaves no such model")
    leaks = leaked(task)
    if settings.clean:
        task = _without_leaks(task, leaks["dev"])
    prepared = _prepare(model, like, task, settings, seed)
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "task": task.name,
        "kind": task.kind,
        "metric": metric_of(task.name, task.kind),
        "model": name,
        "method": method,
        "deterministic": is_deterministic(model, method),
        "protocol": protocol,
        "changed": relevant(method, sorted(given)),
        "seed": seed,
        "settings": settings.model_dump(),
        "source": _describe_source(prepared),
        "data": _describe_data(task_path, prepared, leaks),
    }
    path = result_path(out, task.name, name, seed)
    done = _finished(path, result)
    exported = export is not None and run_of(export) == fingerprint(result)
    if done is not None and (export is None or exported):
        failed_path(path).unlink(missing_ok=True)
        log(f"{path}: this run is done already; its result stands")
        return _summary(done, path, already_done=True)
    if export is not None and not exported and export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise InputError(f"{export}: exists and is not an empty directory; name another one, or remove it")
    if done is not None:
        log(f"{path}: this run is done, and is done again for the weights, which are kept by --export only")
    _make_folder(path.parent)
    _report_input(prepared, leaks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result["environment"] = environment(device) | {"kernels": _choose_kernels(prepared, device, kernels)}
    result["command"] = command
    started = time.monotonic()
    with _repeatable(device):
        outputs, trained = _fit(prepared, device)
    result |= _score(prepared, outputs, leaks["test"], path.with_suffix(".npz"))
    result |= trained | {"seconds": round(time.monotonic() - started, 3)}
    write_atomically(path, dump_json(result))
    failed_path(path).unlink(missing_ok=True)
    if export is not None and not exported and isinstance(prepared.model, Classifier) and prepared.source is not None:
        export_classifier(prepared.model, prepared.objective, prepared.source, result, export)  # last: it may be made later
    log(_sentence(result))
    return _summary(result, path, already_done=False)


def _without_leaks(task: Task, dev_leaked: NDArray[np.bool_]) -> Task:
    dev = task.splits["dev"]
    if dev_leaked.all():
        raise InputError(f"{dev.path}: all of its rows are in train; without them (--clean) there is no dev")
    return replace(task, splits={**task.splits, "dev": dev.take(~dev_leaked)})


def _prepare(model: str, like: str | None, task: Task, settings: Settings, seed: int) -> Prepared:
    """Tokens and the model with its first weights; InputError for what doesn't fit."""
    train_rows = task.splits["train"]
    objective = Objective.of(task.classes, train_rows.labels)
    if settings.method == KMER:
        return Prepared(task, settings, objective, seed, None, {}, None)
    source = None if settings.method == CNN else open_source(model, like, train_rows.sequences)
    if settings.method != "probe":
        total_steps(len(train_rows.labels), settings)
    tokenizer = base_tokenizer() if source is None else source.tokenizer
    vocab_size = tokenizer.get_vocab_size() if source is None else source.config.vocab_size
    # The published lengths are in tokens of the published tokenizer; the convolutions take any number of bases.
    limits = (None, sys.maxsize) if source is None else (settings.max_length, MAX_SEQUENCE)
    tokens = {split: tokenize(rows, tokenizer, vocab_size, *limits) for split, rows in task.splits.items()}
    if source is None:
        return Prepared(task, settings, objective, seed, None, tokens, build_cnn(vocab_size, task.classes, seed))
    if train_rows.seconds is not None and source.config.type_vocab_size < 2:
        raise InputError(f"{source.where}: has {source.config.type_vocab_size} token type, and tasks of pairs need two")
    classifier = build(source.config, task.classes, source.weights, seed, source.where, settings.pooling)
    return Prepared(task, settings, objective, seed, source, tokens, classifier)


def _choose_kernels(prepared: Prepared, device: torch.device, kernels: str) -> dict[str, str] | None:
    if prepared.source is None:
        return None
    longest = max(int(split.lengths.max()) for split in prepared.tokens.values())
    dtype = torch.bfloat16 if prepared.settings.dtype == "bf16" else torch.float32
    return choose_alone(prepared.source.config, device, dtype, longest, kernels)


def _fit(prepared: Prepared, device: torch.device) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Outputs of dev and test by the chosen weights, and what the results file says of the fitting."""
    task, settings, tokens, model = prepared.task, prepared.settings, prepared.tokens, prepared.model
    if settings.method in (KMER, "probe"):
        labels = {split: rows.labels for split, rows in task.splits.items()}
        if isinstance(model, Classifier):
            model.to(device)
            features = {split: embed(model, tokens[split], settings, device) for split in SPLITS}
        else:
            features = {split: kmer_counts(rows) for split, rows in task.splits.items()}
        outputs, curves, penalty = fit_linear(features, labels, prepared.objective, settings.best_by)
        return outputs, {"curves": curves, "steps": 0, "best_step": 0, "penalty": penalty, "tokens_per_second": None}
    assert model is not None
    tuner = None
    if settings.method == "lora" and isinstance(model, Classifier):
        tuner = add_lora(model, settings, prepared.seed)
    model.to(device)
    trained = train(model, tokens["train"], tokens["dev"], prepared.objective, settings, prepared.seed, device)
    if tuner is not None:
        merge_lora(tuner)  # in place; before scoring, so that the scores are those of the exported weights
    outputs = {
        split: prepared.objective.outputs(predict(model, tokens[split], prepared.objective, settings, device))
        for split in ("dev", "test")
    }
    return outputs, {
        "curves": trained.curves,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "train_tokens": trained.tokens,
        "train_seconds": round(trained.seconds, 3),
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),
    }


def _score(
    prepared: Prepared, outputs: Mapping[str, NDArray[Any]], test_leaked: NDArray[np.bool_], predictions: Path
) -> dict[str, Any]:
    """Scores of dev and test for the results file; writes the predictions."""
    objective = prepared.objective
    labels = {split: prepared.task.splits[split].labels for split in outputs}
    scored: dict[str, Any] = {split: objective.evaluate(outputs[split], labels[split]) for split in outputs}
    for split, values in scored.items():
        if not math.isfinite(values["loss"]):
            raise RuntimeError(f"the {split} loss is {values['loss']}; there is no score to report")
    scored["test_clean"] = None
    if test_leaked.any() and not test_leaked.all():
        scored["test_clean"] = objective.evaluate(outputs["test"][~test_leaked], labels["test"][~test_leaked])
    arrays: dict[str, Any] = {f"{split}_logits": values for split, values in outputs.items()}
    arrays |= {f"{split}_labels": values for split, values in labels.items()} | {"test_leaked": test_leaked}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_atomically(predictions, stream.getvalue())
    scored |= {"predictions": predictions.name, "predictions_sha256": hashlib.sha256(stream.getvalue()).hexdigest()}
    return scored | {"collapsed": objective.collapsed(outputs["test"])}


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


def _describe_source(prepared: Prepared) -> dict[str, Any]:
    if prepared.source is not None and isinstance(prepared.model, Classifier):
        source = prepared.source
        return {
            **source.about,
            "config": source.config.model_dump(),
            "encoder_sha256": encoder_sha256(prepared.model),
            "tokenizer_sha256": source.tokenizer_sha256,
        }
    config: dict[str, Any] = {"kmer_bases": list(KMER_BASES), "penalties": list(PENALTIES)}
    if prepared.settings.method == CNN:
        config = {"channels": CHANNELS, "width": WIDTH, "dilations": list(DILATIONS)}
    return {"kind": "baseline", "path": None, "config": config, "encoder_sha256": None, "tokenizer_sha256": None}


def _describe_data(path: Path, prepared: Prepared, leaks: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    task, tokens = prepared.task, prepared.tokens
    about: dict[str, Any] = {"folder": str(path), "classes": task.classes, "made_splits": task.made}
    about["columns"] = list(task.columns)
    for split in SPLITS:
        rows = task.splits[split]
        letters, sequences = rows.other_letters()
        about[split] = {
            "rows": len(rows.labels),
            "rows_a_class": np.bincount(rows.labels, minlength=task.classes).tolist() if task.classes > 1 else None,
            "sha256": rows.sha256,
            "tokens": len(tokens[split].ids) if tokens else None,
            "longest": int(tokens[split].lengths.max()) if tokens else None,  # tokens
            "truncated": tokens[split].truncated if tokens else 0,  # rows
            "leaked": int(leaks[split].sum()) if split in leaks else 0,  # rows whose sequence train (for test: or dev) holds
            "other_letters": letters,  # than A, C, G, T
            "sequences_with_other_letters": sequences,
        }
    return about


def _report_input(prepared: Prepared, leaks: Mapping[str, NDArray[np.bool_]]) -> None:
    task, tokens = prepared.task, prepared.tokens
    if task.name not in PUBLISHED:
        log(f"{task.name}: not a task of the benchmark, so the settings are general ones; check --epochs and the like")
    if len(task.columns) == 3:
        log(f"{task.name}: pairs of {task.columns[0]!r} and {task.columns[1]!r}")
    for split, origin in task.made.items():
        log(f"{task.name}: no {split}.csv, so {len(task.splits[split].labels):,} rows of {origin} are the {split} split")
    counts = ", ".join(f"{split} {len(rows.labels):,}" for split, rows in task.splits.items())
    kind = f"{task.classes} classes" if task.kind == "classification" else "regression"
    mean = f"; {len(tokens['train'].ids) / len(tokens['train'].labels):.1f} tokens a sequence" if tokens else ""
    log(f"{task.name}: {kind}, rows: {counts}{mean}")
    for split, rows in task.splits.items():
        letters, sequences = rows.other_letters()
        if letters:
            log(f"{rows.path}: {letters:,} letters other than A, C, G, T in {sequences:,} sequences, fed as they are")
        if tokens and tokens[split].truncated:
            log(f"{rows.path}: {tokens[split].truncated:,} of {len(rows.labels):,} sequences truncated by --max-length")
        if split in leaks and leaks[split].any():
            where = "train" if split == "dev" else "train or dev"
            left = " and are left out (--clean)" if split == "dev" and prepared.settings.clean else ""
            log(f"{rows.path}: {int(leaks[split].sum()):,} rows have a sequence that {where} holds too{left}")


def _finished(path: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result of this very run, or None; InputError if the file is of a run with other settings or data."""
    if not path.exists():
        return None
    stored = read_result(path)
    if differing := same_run(stored, result):
        raise InputError(
            f"{path}: is the result of another run, it differs in {', '.join(differing)}; give another --out or --label"
        )
    if not whole_predictions(path, stored):
        log(f"{path}: its predictions are gone, or of another run; it is done again")
        return None
    return stored


def _summary(result: Mapping[str, Any], path: Path, already_done: bool) -> dict[str, Any]:
    test, dev = result["test"], result["dev"]
    return {
        "task": result["task"],
        "model": result["model"],
        "seed": result["seed"],
        "metric": result["metric"],
        "test_score": test[result["metric"]],
        "test_mcc": test.get("mcc"),
        "test_f1": test.get("f1_macro"),
        "test_accuracy": test.get("accuracy"),
        "dev_loss": dev["loss"],
        "dev_mcc": dev.get("mcc"),
        "best_step": result["best_step"],
        "steps": result["steps"],
        "collapsed": result["collapsed"],
        "tokens_per_second": result["tokens_per_second"],
        "seconds": result["seconds"],
        "already_done": already_done,
        "path": str(path),
    }


def _sentence(result: Mapping[str, Any]) -> str:
    test, names = result["test"], {"mcc": "MCC", "f1_macro": "macro F1", "pearson": "Pearson", "spearman": "Spearman"}
    shown = ", ".join(f"{name} {test[key]:.4f}" for key, name in names.items() if key in test)
    text = f"{result['task']}, {result['model']}, seed {result['seed']}: test {shown}"
    if result["test_clean"] is not None:
        text += f" ({names[result['metric']]} {result['test_clean'][result['metric']]:.4f} without leaked rows)"
    if result["steps"]:
        text += f" with the weights of step {result['best_step']} of {result['steps']}"
        text += f", {result['tokens_per_second']:,.0f} tokens/s"
    text += f", {result['seconds']:.1f} s"
    return text + ("; COLLAPSED: the same is predicted throughout" if result["collapsed"] else "")


def _make_folder(folder: Path) -> None:
    """Make the results folder now, so that a run doesn't find out at its end that it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: results can't be written there: {error.strerror}") from None
