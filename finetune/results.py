"""The files that runs leave, and how a run is known again. Imports no torch: the pipeline of `slurm/` reads them too.

RESULTS/<task, "/" as "__">/<model>/seed-0.json         written last and atomically: if it is there, the run is whole
                                    seed-0.npz          outputs and labels of dev and test, in the order of the files
                                    seed-0.failed.json  in place of both: what failed; a run that succeeds removes it
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, dump_json, exit_status, one_line, write_atomically
from finetune.folders import SPLITS
from finetune.tasks import METHODS

FORMAT_VERSION = 2
REQUIRED = (
    "task", "kind", "metric", "model", "method", "deterministic", "protocol", "changed", "seed", "settings", "source",
    "data", "dev", "test", "test_clean", "collapsed", "predictions", "predictions_sha256",
)  # fmt: skip
RANDOM, KMER, CNN = "random", "kmer", "cnn"
LINEAR = {  # settings of methods that are no training
    KMER: ("method", "best_by", "clean"),
    "probe": ("method", "best_by", "clean", "pooling", "max_length", "dtype"),
}
BASELINES = {KMER: "kmer-logistic", CNN: "cnn"}  # models that are no encoder, and what they are called in tables


def method_of(model: str, method: str | None) -> str:
    """What is trained; InputError where a baseline is asked for another method."""
    if model in BASELINES:
        if method not in (None, model):
            raise InputError(f"--model {model} is a method of its own; leave out --method {method}")
        return model
    if method in BASELINES:
        raise InputError(f"--method {method} goes with --model {method}")
    return method or "full"


def label_of(model: str, like: str | None, label: str | None, method: str, pooling: str | None) -> str:
    """The name of a model in tables, and of a folder: the method stands in it where it isn't full fine-tuning.

    A label that was given is taken as it is.
    """
    if label is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", label):
            raise InputError(f"--label {label!r}: use letters, digits, '.', '_', '+', '-'; it names a folder")
        return label
    if model in BASELINES:
        return BASELINES[model]
    name = Path(model).resolve().name if model != RANDOM else RANDOM
    if model == RANDOM and like is not None:
        name = f"{RANDOM}-like-{Path(like).resolve().name}"
    if method != "full":
        name += f"-{method}"
    usual = METHODS[method].get("pooling", "cls")
    return name + (f"-{pooling}" if pooling not in (None, usual) else "")


def is_deterministic(model: str, method: str) -> bool:
    """Whether other seeds give the same numbers: convex fits on fixed features."""
    return method == KMER or (method == "probe" and model != RANDOM)


def result_path(out: Path, task: str, label: str, seed: int) -> Path:
    return out / task.replace("/", "__") / label / f"seed-{seed}.json"


def failed_path(path: Path) -> Path:
    """Where the failure of the run with this results file is written."""
    return path.with_name(f"{path.stem}.failed.json")


def write_failure(path: Path, task: str, label: str, seed: int, error: BaseException) -> None:
    """Say beside where the results would be that they are missing, and why."""
    failure = {"task": task, "model": label, "seed": seed, "error": one_line(error), "status": exit_status(error)}
    write_atomically(failed_path(path), dump_json(failure))


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


def same_run(stored: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """In what two runs differ that makes them different runs; empty: their scores agree on one machine."""
    there, here = _identity(stored), _identity(json.loads(dump_json(result)))
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def fingerprint(result: Mapping[str, Any]) -> str:
    """sha256 of what makes a run this run: an exported model carries it."""
    return hashlib.sha256(dump_json(_identity(result))).hexdigest()


def whole_predictions(path: Path, result: Mapping[str, Any]) -> bool:
    """Whether the predictions beside a results file are there, and those of its run."""
    predictions = path.with_name(result["predictions"])
    return predictions.is_file() and hashlib.sha256(predictions.read_bytes()).hexdigest() == result["predictions_sha256"]


def relevant(method: str, names: Iterable[str]) -> list[str]:
    """Those settings that mean something to a method: the fits of `finetune.linear` have no steps and no rate."""
    return [name for name in names if method not in LINEAR or name in LINEAR[method]]


def _identity(result: Mapping[str, Any]) -> dict[str, Any]:
    source, data = result["source"], result["data"]
    return {
        **{name: result["settings"][name] for name in relevant(result["method"], result["settings"])},
        **{f"model {key}": value for key, value in source["config"].items()},
        "task": result["task"],
        "kind": result["kind"],
        "columns": data["columns"],
        **({} if result["method"] in LINEAR else {"protocol": result["protocol"]}),  # its settings are above
        "seed": result["seed"],
        "encoder sha256": source["encoder_sha256"],
        "tokenizer sha256": source["tokenizer_sha256"],
        **{f"{split}.csv sha256": data[split]["sha256"] for split in SPLITS},
    }
