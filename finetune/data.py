"""Reads a task's three CSV files, refuses what would give a wrong score, and turns sequences into tokens.

Letters are fed to the tokenizer as they are: under the published one lower case and N become [UNK], one per base, and under
overlapping k-mers every k-mer does that has one; changing them would change published scores. They are counted, and the run
says how many there were.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.cli import InputError
from data_prep.codec import TextEncoder
from finetune.tasks import task_name
from kernels import MAX_SEQUENCE

SPLITS = ("train", "dev", "test")
_LABEL = re.compile(r"[0-9]{1,9}")
_OTHER = re.compile(r"[^ACGT]")
_TOKENIZED_AT_ONCE = 4096  # sequences; an encoding takes about 100 bytes a token until its ids are copied out


@dataclass(frozen=True)
class Rows:
    """One CSV file."""

    path: Path
    sequences: list[str]
    labels: NDArray[np.int64]  # [rows]
    lines: NDArray[np.int64]  # [rows] line of the file where a row ends
    sha256: str  # of the file

    def other_letters(self) -> tuple[int, int]:
        """Letters other than A, C, G, T, and the number of sequences that have any."""
        counts = [len(_OTHER.findall(sequence)) for sequence in self.sequences]
        return sum(counts), sum(count > 0 for count in counts)


@dataclass(frozen=True)
class Task:
    """A classification task."""

    name: str
    classes: int
    splits: dict[str, Rows]  # train, dev and test


@dataclass(frozen=True)
class Tokens:
    """The tokens of all sequences of a split, end to end, with [CLS] first and [SEP] last in each."""

    ids: NDArray[np.int32]  # [tokens]
    starts: NDArray[np.int64]  # [rows + 1] where each sequence starts
    labels: NDArray[np.int64]  # [rows]
    truncated: int  # sequences that were cut

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


def read_task(folder: Path) -> Task:
    """Read train.csv, dev.csv and test.csv of `folder`; the number of classes is what the labels say.

    Raises InputError naming file and line: a missing or empty file, a column that is not there, an empty sequence,
    labels that are not 0 to C-1, a class that train doesn't have.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a task is a folder with train.csv, dev.csv and test.csv")
    missing = [f"{split}.csv" for split in SPLITS if not (folder / f"{split}.csv").is_file()]
    if missing:
        raise InputError(f"{folder / missing[0]}: not found; a task needs train.csv, dev.csv and test.csv")
    splits = {split: read_rows(folder / f"{split}.csv") for split in SPLITS}
    largest = max(splits.values(), key=lambda rows: int(rows.labels.max()))
    line = int(largest.lines[largest.labels.argmax()])
    classes = int(largest.labels.max()) + 1
    present = np.unique(splits["train"].labels)
    if len(present) < classes:
        absent = int(np.setdiff1d(np.arange(min(classes, len(present) + 1)), present)[0])
        raise InputError(
            f"{splits['train'].path}: has no row of class {absent}, but {largest.path}, line {line} has label "
            f"{classes - 1}; labels must be 0 to C-1, each of them present in train.csv"
        )
    if classes == 1:
        raise InputError(f"{splits['train'].path}: every label is 0; there is nothing to learn")
    return Task(task_name(folder), classes, splits)


def read_rows(path: Path) -> Rows:
    """Read one CSV file with at least the columns `sequence` and `label`; InputError names the line."""
    data = path.read_bytes()
    sequences: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(_decode(path, data), newline=""), strict=True)
    try:
        header = next(reader, [])
        if not header:
            raise InputError(f"{path}: the file is empty; expected a header line `sequence,label` and rows")
        for column in ("sequence", "label"):
            if column not in header:
                raise InputError(
                    f"{path}, line 1: no column {column!r}, the header is {','.join(header)[:100]!r}; "
                    "expected `sequence,label`"
                )
        sequence_column, label_column = header.index("sequence"), header.index("label")
        for row in reader:
            if not row:
                continue  # a blank line, often the last
            where = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} fields where the header has {len(header)}")
            sequence, label = row[sequence_column].strip(), row[label_column].strip()
            if not sequence:
                raise InputError(f"{where}: the sequence is empty")
            if not _LABEL.fullmatch(label):
                raise InputError(f"{where}: label {label!r} is not an integer; labels must be 0 to C-1")
            sequences.append(sequence)
            labels.append(int(label))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    if not sequences:
        raise InputError(f"{path}: has a header but no rows")
    return Rows(path, sequences, np.array(labels), np.array(lines), hashlib.sha256(data).hexdigest())


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not text (UTF-8); is the file compressed?") from None


def tokenize(rows: Rows, tokenizer: Tokenizer, vocab_size: int, max_length: int | None) -> Tokens:
    """Tokens of every row; a sequence over `max_length` tokens, with [CLS] and [SEP], loses its end and is counted.

    Raises InputError: a token beyond the model's vocabulary, a sequence longer than the model can take.
    """
    cls, sep = (_special(tokenizer, token) for token in ("[CLS]", "[SEP]"))
    encode = TextEncoder(tokenizer)
    parts: list[NDArray[np.integer]] = []  # content tokens of each row
    truncated = 0
    limit = (MAX_SEQUENCE if max_length is None else min(max_length, MAX_SEQUENCE)) - 2
    for first in range(0, len(rows.sequences), _TOKENIZED_AT_ONCE):
        tokens, counts = encode(rows.sequences[first : first + _TOKENIZED_AT_ONCE])
        for content in np.split(tokens, np.cumsum(counts)[:-1]):
            if not len(content):
                raise InputError(
                    f"{rows.path}, line {rows.lines[len(parts)]}: {rows.sequences[len(parts)]!r} has no token under the "
                    f"model's tokenizer{f' of {encode.k}-mers' if encode.k else ''}; remove the row"
                )
            if len(content) > limit:
                if max_length is None:
                    raise InputError(
                        f"{rows.path}, line {rows.lines[len(parts)]}: {len(content)} tokens, the model takes "
                        f"{MAX_SEQUENCE - 2}; give --max-length to truncate"
                    )
                truncated += 1
            parts.append(content[:limit])
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) + 2 for part in parts], out=starts[1:])
    ids = np.empty(starts[-1], dtype=np.int32)
    ids[starts[:-1]], ids[starts[1:] - 1] = cls, sep
    for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
        ids[start + 1 : stop - 1] = part
    if int(ids.max()) >= vocab_size:
        row = int(np.searchsorted(starts, int((ids >= vocab_size).argmax()), side="right")) - 1
        raise InputError(
            f"{rows.path}, line {rows.lines[row]}: the tokenizer gives token {int(ids.max())}, but the model has "
            f"{vocab_size}; tokenizer and weights don't belong together"
        )
    return Tokens(ids, starts, rows.labels, truncated)


def _special(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InputError(f"the model's tokenizer has no token {token}; fine-tuning needs one in front or at the end")
    return int(number)
