"""Reads a task's CSV files, refuses what would give a wrong score, and makes the splits that a user's own data lacks.

Letters are fed to the tokenizer as they are: under the published one lower case and N become [UNK], one per base, and under
overlapping k-mers every k-mer does that has one; changing them would change published scores. They are counted, and the run
says how many there were.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.audit.evaluations import is_dna
from data_prep.cli import InputError
from finetune.folders import SPLITS, check_splits, split_files, task_name

Kind = Literal["classification", "regression"]
SPLIT_SHARES = {"test": 0.1, "dev": 0.1}  # of the sequences, where a user's own data has no such file
MOST_CLASSES = 1000  # a larger label is a target of regression, or a number of something
_INTEGER = re.compile(r"[0-9]{1,9}")
_OTHER = re.compile(r"[^ACGT]")
_COMPLEMENT = bytes.maketrans(b"ACGTRYKMBVDH", b"TGCAYRMKVBHD")  # with the codes of IUPAC; the others stay


@dataclass(frozen=True)
class Columns:
    """What the columns of the files mean; None: found by their names."""

    sequences: tuple[str, ...] | None = None  # one, or two of a pair
    label: str | None = None
    kind: Kind | None = None  # None: regression where labels have a decimal point, else classification


@dataclass(frozen=True)
class Rows:
    """The rows of one split."""

    path: Path
    sequences: list[str]
    labels: NDArray[Any]  # [rows] int64 class, or float64 target of regression
    lines: NDArray[np.int64]  # [rows] line of the file where a row ends
    sha256: str  # of the file
    seconds: list[str] | None = None  # the other sequence of each row, in tasks of pairs
    places: list[str] | None = None  # what messages call each row, where that isn't its line

    def where(self, row: int) -> str:
        """File and line, for messages."""
        return f"{self.path}, line {self.lines[row]}" if self.places is None else self.places[row]

    def texts(self) -> list[str]:
        """What decides whether two rows are the same input: the sequence, or both of a pair."""
        if self.seconds is None:
            return self.sequences
        return [f"{first} {second}" for first, second in zip(self.sequences, self.seconds, strict=True)]

    def other_letters(self) -> tuple[int, int]:
        """Letters other than A, C, G, T, and the number of rows that have any."""
        counts = [len(_OTHER.findall(text)) for text in self.sequences]
        if self.seconds is not None:
            counts = [count + len(_OTHER.findall(text)) for count, text in zip(counts, self.seconds, strict=True)]
        return sum(counts), sum(count > 0 for count in counts)

    def take(self, rows: NDArray[Any]) -> Rows:
        """Some of the rows: numbers, or a mask."""
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        seconds = None if self.seconds is None else [self.seconds[row] for row in index]
        sequences = [self.sequences[row] for row in index]
        return Rows(self.path, sequences, self.labels[index], self.lines[index], self.sha256, seconds)


@dataclass(frozen=True)
class Task:
    """A classification or regression task."""

    name: str
    classes: int  # 1: regression
    splits: dict[str, Rows]  # train, dev and test
    columns: tuple[str, ...] = ("sequence", "label")  # of the files: one of sequences or two of pairs, then the label
    made: dict[str, str] = field(default_factory=dict)  # split -> what it was split off, for those that have no file

    @property
    def kind(self) -> Kind:
        return "regression" if self.classes == 1 else "classification"


def read_task(path: Path, columns: Columns | None = None) -> Task:
    """Read the files of a task's folder, or one CSV file; the number of classes is what the labels say.

    Splits for which a user's own data has no file are split off by a hash of the sequence, so that rows that are equal on
    either strand stay together, the same ones for every seed.

    Raises InputError naming file and line: a missing or empty file, a column that is not there, an empty sequence,
    labels that are not 0 to C-1, a class that train doesn't have.
    """
    columns = columns or Columns()
    check_splits(path)
    files = {"train": path} if path.is_file() else split_files(path)
    tables = {split: _read_table(file, columns) for split, file in files.items()}
    found = {split: ",".join(table.columns) for split, table in tables.items()}
    if len(set(found.values())) > 1:
        raise InputError(
            f"{path}: its files don't have the same columns: {found}; name them: --sequence-columns, --label-column"
        )
    kind = columns.kind or _kind(list(tables.values()))
    splits = {split: table.rows(kind) for split, table in tables.items()}
    made: dict[str, str] = {}
    for split, share in SPLIT_SHARES.items():
        if split not in splits:
            taken = _chosen(splits["train"].texts(), split, share)
            if not taken.any() or taken.all():
                raise InputError(f"{files['train']}: too few different sequences to split off {split}; give a {split}.csv")
            splits["train"], splits[split] = splits["train"].take(~taken), splits["train"].take(taken)
            made[split] = files["train"].name
    splits = {split: splits[split] for split in SPLITS}
    classes = 1 if kind == "regression" else _classes(splits, made)
    if kind == "regression" and np.ptp(splits["train"].labels) == 0:
        raise InputError(f"{splits['train'].path}: every label is the same; there is nothing to learn")
    return Task(task_name(path), classes, splits, tables["train"].columns, made)


def _classes(splits: dict[str, Rows], made: dict[str, str]) -> int:
    """C, where the labels are 0 to C-1 and train has each of them."""
    largest = max(splits.values(), key=lambda rows: int(rows.labels.max()))
    line = int(largest.lines[largest.labels.argmax()])
    classes = int(largest.labels.max()) + 1
    present = np.unique(splits["train"].labels)
    if len(present) < classes:
        absent = int(np.setdiff1d(np.arange(min(classes, len(present) + 1)), present)[0])
        for split in made:
            if absent in splits[split].labels:
                raise InputError(
                    f"{splits['train'].path}: all rows of class {absent} have come into {split}, which was split off it; "
                    f"give a {split}.csv, or more rows of that class"
                )
        raise InputError(
            f"{splits['train'].path}: has no row of class {absent}, but {largest.path}, line {line} has label "
            f"{classes - 1}; labels must be 0 to C-1, each of them present in train.csv "
            "(numbers to predict: --kind regression)"
        )
    if classes == 1:
        raise InputError(f"{splits['train'].path}: every label is 0; there is nothing to learn")
    if classes > MOST_CLASSES:
        raise InputError(
            f"{largest.path}, line {line}: label {classes - 1} makes {classes} classes; is it --kind regression?"
        )
    return classes


def strandless(text: str) -> bytes:
    """One name for a sequence and its reverse complement, in upper case; of a pair each part by itself."""
    parts = []
    for part in text.upper().encode("ascii", "replace").split(b" "):
        parts.append(min(part, part.translate(_COMPLEMENT)[::-1]))
    return b" ".join(parts)


def _chosen(texts: Sequence[str], split: str, share: float) -> NDArray[np.bool_]:
    """Which rows are split off; a row and its equals are or are not, whatever else is in the file."""

    def draw(text: str) -> float:
        return int.from_bytes(hashlib.sha256(split.encode() + b" " + strandless(text)).digest()[:8], "big") / 2**64

    return np.array([draw(text) < share for text in texts], dtype=np.bool_)


@dataclass(frozen=True)
class _Table:
    """A CSV file, its labels still text."""

    path: Path
    columns: tuple[str, ...]  # of the sequences, then of the label
    sequences: list[list[str]]  # a list a column
    labels: list[str]
    lines: list[int]
    sha256: str

    def rows(self, kind: Kind) -> Rows:
        labels: NDArray[Any]
        if kind == "regression":
            labels = np.array([self._number(label, line) for label, line in zip(self.labels, self.lines, strict=True)])
        else:
            for label, line in zip(self.labels, self.lines, strict=True):
                if not _INTEGER.fullmatch(label):
                    raise InputError(
                        f"{self.path}, line {line}: label {label!r} is not an integer; labels must be 0 to C-1 "
                        "(numbers to predict: --kind regression)"
                    )
            labels = np.array([int(label) for label in self.labels], dtype=np.int64)
        first, *second = self.sequences
        return Rows(self.path, first, labels, np.array(self.lines), self.sha256, second[0] if second else None)

    def _number(self, label: str, line: int) -> float:
        number = as_number(label)
        if number is None:
            raise InputError(f"{self.path}, line {line}: label {label!r} is not a finite number")
        return number


def as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _kind(tables: Sequence[_Table]) -> Kind:
    """Regression where every label is a number and one has decimals; InputError for -1 and 1.0, which may be either."""
    labels = [label for table in tables for label in table.labels]
    if all(_INTEGER.fullmatch(label) for label in labels) or any(as_number(label) is None for label in labels):
        return "classification"
    if not all(float(label).is_integer() for label in labels):
        return "regression"
    where, label = next(
        (f"{table.path}, line {line}", label)
        for table in tables
        for label, line in zip(table.labels, table.lines, strict=True)
        if not _INTEGER.fullmatch(label)
    )
    raise InputError(
        f"{where}: label {label!r} is no class 0 to C-1; if all labels are numbers to predict: --kind regression"
    )


def read_rows(path: Path, columns: Columns | None = None) -> Rows:
    """Read one CSV file; InputError names the line."""
    table = _read_table(path, columns or Columns())
    return table.rows((columns and columns.kind) or _kind([table]))


def _read_table(path: Path, columns: Columns) -> _Table:
    data = path.read_bytes()
    labels: list[str] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(decode(path, data), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise InputError(f"{path}: the file is empty; expected a header line `sequence,label` and rows")
        first = next((row for row in reader if row), [])
        names, label_name = columns_of(path, header, columns, first)
        places, label_place = [header.index(name) for name in names], header.index(label_name)
        sequences: list[list[str]] = [[] for _ in names]
        for row in chain([first], reader):
            if not row:
                continue  # a blank line, often the last
            where = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} fields where the header has {len(header)}")
            for place, texts in zip(places, sequences, strict=True):
                if not (text := row[place].strip()):
                    raise InputError(f"{where}: the sequence is empty")
                texts.append(text)
            labels.append(row[label_place].strip())
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    if not labels:
        raise InputError(f"{path}: has a header but no rows")
    return _Table(path, (*names, label_name), sequences, labels, lines, hashlib.sha256(data).hexdigest())


def columns_of(path: Path, header: Sequence[str], columns: Columns, first: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Names of the columns of sequences and of the label.

    Where nothing is said: `label`, and `sequence`, or one or two columns whose names begin with `seq`, or the only two
    others if the `first` row has DNA in both, as in GUE+'s pairs of enhancer and promoter. Raises InputError.
    """
    label = columns.label or "label"
    wanted = columns.sequences
    if wanted is None:
        others = [name for name in header if name != label]
        alike = [name for name in others if name.lower().startswith("seq")]
        values = dict(zip(header, first, strict=False))
        if "sequence" in others:
            wanted = ("sequence",)
        elif len(alike) in (1, 2):
            wanted = tuple(alike)
        elif len(others) == 2 and all(is_dna(values.get(name, "").strip()) for name in others):
            wanted = tuple(others)
        else:
            wanted = ("sequence",)
    for name in (*wanted, label):
        if name not in header:
            raise InputError(
                f"{path}, line 1: no column {name!r}, the header is {','.join(header)[:100]!r}; "
                "expected `sequence,label`, or name them: --sequence-columns, --label-column"
            )
    return wanted, label


def decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not text (UTF-8); is the file compressed?") from None
