"""In what the runs of a table differ from the published protocol, read off their settings and data.

A line a difference, with the models and tasks that it is of, so that what all share is said once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.cli import InputError
from finetune.report.collect import SPLITS, Row
from finetune.tasks import METHODS, PUBLISHED, STRICT_SEEDS, settings_for

METHOD_NAMES = {
    "lora": "only low-rank updates are trained (LoRA); published: all weights",
    "probe": "the encoder is frozen and a linear model fitted to its outputs; published: all weights are trained",
    "kmer": "a baseline without encoder: logistic regression on counts of k-mers",
    "cnn": "a baseline without encoder: a convolutional network",
}
BEST = {"loss": "lowest dev loss", "score": "highest dev score"}
UNTRAINED = ("probe", "kmer")  # methods for which the settings of training mean nothing
SHOWN_TASKS = 6  # by name


def protocol_lines(rows: Sequence[Row]) -> list[str]:
    """The differences, those of most models and tasks first, then what the data differ in."""
    known = [row for row in rows if row.task in PUBLISHED and row.results]
    where: dict[str, list[Row]] = defaultdict(list)
    for row in known:
        for text in _differences(row):
            where[text].append(row)
    ordered = sorted(where.items(), key=lambda item: -len(item[1]))
    lines = [f"{_where(those, known)}: {text}" for text, those in ordered]
    lines += _data(known)
    if others := sorted({row.task for row in rows} - PUBLISHED.keys()):
        lines.append(f"{', '.join(others)}: not in the benchmark; nothing is published to differ from")
    return lines


def _differences(row: Row) -> Iterator[str]:
    result = row.results[0]  # a note says where the others are of another kind
    settings, method = result["settings"], result["method"]
    changed = f", with {', '.join(result['changed'])} changed" if result["changed"] else ""
    if changed or result["protocol"] != "paper":
        yield f"run under the protocol `{result['protocol']}`{changed}"
    if method != "full":
        yield METHOD_NAMES[method]
    if len(row.results) < STRICT_SEEDS and not row.deterministic:
        yield f"fewer than {STRICT_SEEDS} seeds"
    if settings.get("clean"):
        yield "dev rows whose sequence is in train are left out"
    for split, origin in sorted((result["data"].get("made_splits") or {}).items()):
        yield f"{split} was split off {origin}"
    yield from _settings(row.task, settings, method)


def _settings(task: str, settings: Mapping[str, Any], method: str) -> Iterator[str]:
    try:
        published = settings_for(task, "paper").model_dump(mode="json")
    except InputError:
        return
    settings = {**published, **settings}
    trained = method not in UNTRAINED
    length, theirs = settings["max_length"], published["max_length"]
    if method != "kmer" and length != theirs:
        if length is None:
            yield "no sequence is truncated; the published scripts truncate"
        else:
            yield f"sequences are truncated at {length} tokens; published: {_text(theirs)}"
    if trained and settings["best_by"] != published["best_by"]:
        yield f"the weights of the {BEST[settings['best_by']]} are kept; published: of the {BEST[published['best_by']]}"
    if method != "kmer":
        yield f"matrix products in {settings['dtype']}; published: fp16"
    if method in ("full", "lora", "probe") and settings["pooling"] != published["pooling"]:
        yield f"pooling {settings['pooling']}; published: {published['pooling']}"
    said = {"max_length", "best_by", "dtype", "pooling", "method", "clean"}
    for key, value in published.items() if trained else ():
        if key not in said and settings[key] != value and not key.startswith("lora_"):
            yield f"{key} {_text(settings[key])}; published: {_text(value)}{_own(method, key, settings[key])}"


def _own(method: str, key: str, value: Any) -> str:
    return f" (the default of {method})" if method != "full" and METHODS[method].get(key) == value else ""


def _data(known: Sequence[Row]) -> Iterator[str]:
    """Numbers of rows that are not those of the benchmark's files, and those files' that are not the paper's."""
    from finetune.audit import PAPER_ROWS, PUBLISHED_ROWS

    others: dict[str, None] = {}
    papers: dict[str, None] = {}
    for row in known:
        there = tuple(row.results[0]["data"][split]["rows"] for split in SPLITS)
        files, paper = PUBLISHED_ROWS.get(row.task, there), PAPER_ROWS.get(row.task)
        if there not in (files, paper):
            others[f"{row.task} {_rows(there)} (theirs {_rows(files)})"] = None
        elif paper is not None and there != paper:
            papers[f"{row.task} {_rows(there)} (the paper {_rows(paper)})"] = None
    if others:
        yield f"Rows of {'/'.join(SPLITS)} that are not those of the benchmark's files: {'; '.join(others)}"
    if papers:
        yield f"Rows of the benchmark's files that are not those that the paper names: {'; '.join(papers)}"


def _rows(counts: Sequence[int]) -> str:
    return "/".join(f"{count:,}" for count in counts)


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _where(those: Sequence[Row], known: Sequence[Row]) -> str:
    """Models and tasks that a line is of; models with the same tasks together."""
    if len(those) == len(known):
        return "All"
    tasks_of: dict[str, list[str]] = defaultdict(list)
    for row in those:
        tasks_of[row.model].append(row.task)
    every: dict[str, list[str]] = defaultdict(list)
    for row in known:
        every[row.model].append(row.task)
    models_of: dict[str, list[str]] = defaultdict(list)
    for model, tasks in tasks_of.items():
        models_of["" if tasks == every[model] else _names(tasks)].append(model)
    parts = []
    for names, models in models_of.items():
        who = "" if len(models) == len(every) else ", ".join(f"`{model}`" for model in models)
        parts.append(f"{who} in {names}" if who and names else who or names)
    return "; ".join(parts)


def _names(tasks: Sequence[str]) -> str:
    shown = ", ".join(tasks[:SHOWN_TASKS])
    return f"{shown} and {len(tasks) - SHOWN_TASKS} more" if len(tasks) > SHOWN_TASKS else shown
