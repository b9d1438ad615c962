"""Says what a task's files hold before anyone trains on them: rows, labels, rows that stand twice, what truncation cuts.

A score on rows that train has too is memory, one on sequences with several labels has a ceiling, one of truncated sequences
is of something else. Files are read one by one, so that a task with a file missing, or one that can't be read, is audited
with what is there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, log, one_line, write_atomically
from data_prep.codec import TextEncoder, open_tokenizer
from finetune.audit_report import as_csv, as_line, as_markdown
from finetune.data import MOST_CLASSES, Columns, Rows, read_rows, strandless
from finetune.folders import SPLITS, find_tasks, split_files, task_name
from finetune.options import add_columns, columns
from finetune.tasks import published_max_length

AT_ONCE = 256  # sequences tokenized; those of GUE+ have 10,000 bases, and a token takes about 100 bytes
SHOWN = 5  # problems in the error at the end, each of which was logged; classes that are missing
SHORTEST_MAX_LENGTH = 4  # as `Settings.max_length`

# Rows of train, dev and test, as the benchmark's files have them.
PUBLISHED_ROWS: dict[str, tuple[int, int, int]] = {
    "EMP/H3": (11971, 1497, 1497),
    "EMP/H3K14ac": (26438, 3305, 3305),
    "EMP/H3K36me3": (27904, 3488, 3488),
    "EMP/H3K4me1": (25341, 3168, 3168),
    "EMP/H3K4me2": (24545, 3069, 3069),
    "EMP/H3K4me3": (29439, 3680, 3680),
    "EMP/H3K79me3": (23069, 2884, 2884),
    "EMP/H3K9ac": (22224, 2779, 2779),
    "EMP/H4": (11679, 1461, 1461),
    "EMP/H4ac": (27275, 3410, 3410),
    "prom/prom_core_all": (47356, 5920, 5920),
    "prom/prom_core_notata": (42452, 5307, 5307),
    "prom/prom_core_tata": (4904, 613, 613),
    "prom/prom_300_all": (47356, 5920, 5920),
    "prom/prom_300_notata": (42452, 5307, 5307),
    "prom/prom_300_tata": (4904, 613, 613),
    "splice/reconstructed": (36496, 4562, 4562),
    "tf/0": (32378, 1000, 1000),
    "tf/1": (30672, 1000, 1000),
    "tf/2": (19000, 1000, 1000),
    "tf/3": (27294, 1000, 1000),
    "tf/4": (19000, 1000, 1000),
    "mouse/0": (6478, 810, 810),
    "mouse/1": (53952, 6745, 6745),
    "mouse/2": (2620, 328, 328),
    "mouse/3": (1904, 239, 239),
    "mouse/4": (15064, 1883, 1883),
    "virus/covid": (73335, 9166, 9168),
}
PAPER_ROWS = {"EMP/H3K79me3": (23069, 2883, 2884), "virus/covid": (77669, 7000, 7000)}  # where the paper has others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    text = "folder with folders of the CSV files, such as GUE; one such folder; or one CSV file"
    parser.add_argument("--data", type=Path, required=True, metavar="GUE_DIR", help=text)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these, such as tf/0 mouse/1 (default: all)")
    text = "write audit.md, audit.csv and duplicates.csv here (default: Markdown on stdout)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "tokenizer.json, or a model's directory that has one: count tokens too"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=text)
    text = "count rows over this many tokens, [CLS] and [SEP] included (default: where the published scripts truncate)"
    parser.add_argument("--max-length", type=int, metavar="N", help=text)
    add_columns(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Audit the tasks that the command line names.

    Raises InputError, after everything else was audited and written, for files that can't be read.
    """
    if args.max_length is not None and args.tokenizer is None:
        raise InputError("--max-length counts tokens; give --tokenizer too")
    if args.max_length is not None and args.max_length < SHORTEST_MAX_LENGTH:
        raise InputError(f"--max-length {args.max_length}: must be at least {SHORTEST_MAX_LENGTH}")
    if args.sequence_columns is not None and len(args.sequence_columns) > 2:
        raise InputError(f"--sequence-columns {' '.join(args.sequence_columns)}: give one, or the two of a pair")
    encoder = _open_encoder(args.tokenizer) if args.tokenizer is not None else None
    tasks: dict[str, dict[str, Any]] = {}
    findings: list[tuple[str, str, int, str, str]] = []  # task, split, line, label, what
    for name, path in _paths(args.data, args.tasks).items():
        splits, problems = _read(path, columns(args))
        twins = {"exact": Twins(splits, str), "strandless": Twins(splits, _digest)}
        max_length = published_max_length(name) if args.max_length is None else args.max_length
        tasks[name] = _audit(name, splits, twins, encoder, max_length) | {"problems": problems}
        findings += [(name, *finding) for finding in _findings(splits, twins)]
        log(as_line(name, tasks[name]))
        for problem in problems:
            log(f"{name}: {problem}")
    result = {
        "path": str(args.data),
        "tokenizer": str(args.tokenizer) if args.tokenizer is not None else None,
        "tasks": tasks,
    }
    if args.out is not None:
        for file, text in (
            ("audit.md", as_markdown(result)),
            ("audit.csv", as_csv(result)),
            ("duplicates.csv", _findings_csv(findings)),
        ):
            write_atomically(args.out / file, text.encode())
        log(f"{args.out / 'audit.md'}, audit.csv: {len(tasks)} tasks; duplicates.csv: {len(findings):,} rows")
    elif not args.json:
        print(as_markdown(result), end="")
    failed = [problem for task in tasks.values() for problem in task["problems"]]
    if failed:
        more = f"; {len(failed) - SHOWN} more, see above" if len(failed) > SHOWN else ""
        raise InputError(f"all else is audited, but: {'; '.join(failed[:SHOWN])}{more}")
    return result


def _paths(data: Path, names: Sequence[str] | None) -> dict[str, Path]:
    if not data.is_file():
        return find_tasks(data, names)
    if names:
        raise InputError(f"--tasks chooses among the folders below --data, but {data} is a file")
    return {task_name(data): data}


def _open_encoder(path: Path) -> TextEncoder:
    return TextEncoder(open_tokenizer(path / "tokenizer.json" if path.is_dir() else path))


def _read(path: Path, said: Columns) -> tuple[dict[str, Rows], list[str]]:
    """The splits that can be read, and a line for each thing that is wrong."""
    try:
        files = {"train": path} if path.is_file() else split_files(path)
    except InputError as error:
        return {}, [one_line(error)]
    splits, problems = _read_files(files, said)
    if said.kind is None and any(rows.labels.dtype.kind == "f" for rows in splits.values()):
        # Numbers to predict, as one file's labels say; another file may have whole ones only.
        splits, problems = _read_files(files, replace(said, kind="regression"))
    if len({rows.seconds is None for rows in splits.values()}) > 1:
        return {}, [*problems, f"{path}: some of its files have one column of sequences, others two"]
    return splits, problems


def _read_files(files: Mapping[str, Path], said: Columns) -> tuple[dict[str, Rows], list[str]]:
    splits: dict[str, Rows] = {}
    problems: list[str] = []
    for split in SPLITS:
        if split in files:
            try:
                splits[split] = read_rows(files[split], said)
            except (InputError, OSError) as error:
                problems.append(one_line(error))
    return splits, problems


def _digest(text: str) -> bytes:
    return hashlib.blake2b(strandless(text), digest_size=16).digest()


class Twins:
    """Which rows are the same input. Rows with one name are."""

    def __init__(self, splits: Mapping[str, Rows], name: Callable[[str], str | bytes]) -> None:
        numbers: dict[str | bytes, int] = {}
        self.rows = {  # split -> [rows] number of its name
            split: np.array([numbers.setdefault(name(text), len(numbers)) for text in rows.texts()], dtype=np.int64)
            for split, rows in splits.items()
        }
        self.labels = {split: rows.labels for split, rows in splits.items()}
        self.inputs = len(numbers)  # distinct ones

    def within(self, split: str) -> NDArray[np.bool_]:
        """[rows] of `split` that repeat an earlier row of it."""
        repeats = np.ones(len(self.rows[split]), dtype=np.bool_)
        repeats[np.unique(self.rows[split], return_index=True)[1]] = False
        return repeats

    def held(self, split: str, other: str) -> NDArray[np.bool_]:
        """[rows] of `split` that `other` has too."""
        return np.isin(self.rows[split], self.rows[other])

    def relabelled(self, split: str, other: str) -> NDArray[np.bool_]:
        """[rows] of `split` that `other` has with another label; it may have them with the same one too."""
        low, high = self._range([other])
        rows, labels = self.rows[split], self.labels[split]
        return self.held(split, other) & ((low[rows] != labels) | (high[rows] != labels))

    def contradictory(self, splits: Sequence[str]) -> NDArray[np.bool_]:
        """[inputs] that have several labels in these splits."""
        low, high = self._range(splits)
        return low < high

    def _range(self, splits: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest label of each input."""
        low, high = np.full(self.inputs, np.inf), np.full(self.inputs, -np.inf)
        for split in splits:
            np.minimum.at(low, self.rows[split], self.labels[split])
            np.maximum.at(high, self.rows[split], self.labels[split])
        return low, high


def _audit(
    name: str, splits: Mapping[str, Rows], twins: Mapping[str, Twins], encoder: TextEncoder | None, max_length: int | None
) -> dict[str, Any]:
    """Everything about one task. Counts of rows are in `splits`; what can't be counted for want of a file is None."""
    regression = any(rows.labels.dtype.kind == "f" for rows in splits.values())
    exact, either = twins["exact"], twins["strandless"]
    task: dict[str, Any] = {
        "kind": "regression" if regression else "classification",
        "classes": None if regression else len(set(chain.from_iterable(rows.labels.tolist() for rows in splits.values()))),
        "inputs": exact.inputs,
        "contradictory": int(exact.contradictory(list(splits)).sum()),
        "contradictory_either_strand": int(either.contradictory(list(splits)).sum()),
        "max_length": max_length,
        "splits": {},
    }
    for key, each in (("contradictory_in_train", exact), ("contradictory_in_train_either_strand", either)):
        task[key] = int(each.contradictory(["train"]).sum()) if "train" in splits else None
    for split, rows in splits.items():
        published = PUBLISHED_ROWS[name][SPLITS.index(split)] if name in PUBLISHED_ROWS else None
        row: dict[str, Any] = {"rows": len(rows.labels), "published": published}
        row |= _labels(rows, regression) | _bases(rows) | _twins(split, splits, exact, either)
        row["other_letters"], row["rows_with_other_letters"] = rows.other_letters()
        row |= _tokens(rows, encoder, max_length) if encoder is not None else {}
        task["splits"][split] = row
    return task | {"notes": _notes(name, splits, task)}


def _labels(rows: Rows, regression: bool) -> dict[str, Any]:
    if regression:
        return {
            f"label_{name}": float(of(rows.labels)) for name, of in (("min", np.min), ("mean", np.mean), ("max", np.max))
        }
    values, counts = np.unique(rows.labels, return_counts=True)
    each = {str(label): int(count) for label, count in zip(values, counts, strict=True)}
    share = float(counts.max() / len(rows.labels))
    return {"rows_a_class": each if len(each) <= MOST_CLASSES else None, "largest_share": share}


def _bases(rows: Rows) -> dict[str, float]:
    found: dict[str, float] = {}
    for prefix, texts in (("", rows.sequences), ("second_", rows.seconds)):
        if texts is not None:
            lengths = np.array([len(text) for text in texts])
            found[f"{prefix}bases_min"], found[f"{prefix}bases_max"] = int(lengths.min()), int(lengths.max())
            found[f"{prefix}bases_median"] = float(np.median(lengths))
    return found


def _twins(split: str, splits: Mapping[str, Rows], exact: Twins, either: Twins) -> dict[str, int | None]:
    """Rows of one split that stand elsewhere too."""
    found: dict[str, int | None] = {}
    for suffix, twins in (("", exact), ("_either_strand", either)):
        found[f"repeats{suffix}"] = int(twins.within(split).sum())
        for other in SPLITS[: SPLITS.index(split)]:
            there = other in splits
            found[f"in_{other}{suffix}"] = int(twins.held(split, other).sum()) if there else None
            if other == "train":
                found[f"in_train_other_label{suffix}"] = int(twins.relabelled(split, other).sum()) if there else None
    found["several_labels"] = int(exact.contradictory(list(splits))[exact.rows[split]].sum())
    return found


def _tokens(rows: Rows, encoder: TextEncoder, max_length: int | None) -> dict[str, Any]:
    """Lengths with [CLS] and [SEP], and of pairs the second [SEP], as a model gets them and truncation counts them."""
    lengths = np.ones(len(rows.labels), dtype=np.int64)
    for texts in (rows.sequences, rows.seconds):
        if texts is not None:
            starts = range(0, len(texts), AT_ONCE)
            lengths += np.concatenate([encoder(texts[start : start + AT_ONCE])[1] for start in starts]) + 1
    return {
        "tokens_mean": float(lengths.mean()),
        "tokens_p99": int(np.percentile(lengths, 99, method="inverted_cdf")),
        "tokens_max": int(lengths.max()),
        "over_max_length": None if max_length is None else int((lengths > max_length).sum()),
    }


def _notes(name: str, splits: Mapping[str, Rows], task: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables would miss."""
    notes = []
    counts = tuple(len(splits[split].labels) if split in splits else None for split in SPLITS)
    if missing := [split for split in SPLITS if split not in splits]:
        notes.append(f"{', '.join(missing)}: not there; nothing is said of it")
    for published, of in ((PUBLISHED_ROWS, "the benchmark's files have"), (PAPER_ROWS, "the paper says")):
        if name in published and any(here not in (None, said) for here, said in zip(counts, published[name], strict=True)):
            here = "/".join("-" if count is None else str(count) for count in counts)
            notes.append(f"{here} rows, {of} {'/'.join(map(str, published[name]))}")
    if task["classes"] is not None and "train" in splits:
        train = set(splits["train"].labels.tolist())
        largest = max(int(rows.labels.max()) for rows in splits.values())
        if len(train) <= largest:
            absent = sorted(set(range(min(largest + 1, len(train) + SHOWN))) - train)
            some = ", ".join(map(str, absent[:SHOWN])) + (", ..." if largest + 1 - len(train) > SHOWN else "")
            notes.append(
                f"train has no row of class {some}; labels must be 0 to C-1 (numbers to predict: --kind regression)"
            )
    return notes


def _findings(splits: Mapping[str, Rows], twins: Mapping[str, Twins]) -> list[tuple[str, int, str, str]]:
    """(split, line, label, what) of rows that stand twice, or whose sequence has several labels; in the files' order."""
    exact, either = twins["exact"], twins["strandless"]
    found = []
    for split, rows in splits.items():
        repeats = f"repeats an earlier row of {split}"
        masks = {repeats: exact.within(split)}
        masks[f"{repeats} but for strand or case"] = either.within(split) & ~exact.within(split)
        for other in SPLITS[: SPLITS.index(split)]:
            if other in splits:
                masks[f"in {other}"] = exact.held(split, other)
                masks[f"in {other} but for strand or case"] = either.held(split, other) & ~exact.held(split, other)
                masks[f"in {other} with another label"] = exact.relabelled(split, other)
        masks["sequence has several labels"] = exact.contradictory(list(splits))[exact.rows[split]]
        at = [(int(row), what) for what, mask in masks.items() for row in np.flatnonzero(mask)]
        found += [(split, int(rows.lines[row]), str(rows.labels[row]), what) for row, what in sorted(at)]
    return found


def _findings_csv(findings: Sequence[tuple[str, str, int, str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("task", "split", "line", "class", "what"))
    writer.writerows(findings)
    return stream.getvalue()
