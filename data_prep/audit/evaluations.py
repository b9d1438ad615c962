"""Reads the sequences of evaluation sets such as GUE: folders with train.csv, dev.csv and test.csv."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.audit.matches import Texts
from data_prep.cli import InputError, log

PARTS = ("train", "dev", "test")
USUAL = ["sequence"]  # names of the columns that need no mention
ROWS_TO_CHOOSE = 100  # by which columns are chosen
_DNA = re.compile(r"[ACGTRYSWKMBDHVN]{8,}", re.IGNORECASE | re.ASCII)  # with the codes of IUPAC
_BASES = re.compile(r"[ACGTN]", re.IGNORECASE | re.ASCII)
_BETWEEN_CUTS = re.compile(rb"[ACGT]+")


@dataclass(frozen=True)
class Evaluation:
    """One CSV file of an evaluation set."""

    name: str  # of the set: its folder below --against
    part: str
    sequences: int  # rows; one with several columns of DNA counts once
    bases: int
    texts: Texts  # their stretches of A, C, G, T
    row: NDArray[np.int64]  # [stretches of texts] which sequence each belongs to


def read_evaluations(root: Path, parts: Sequence[str]) -> Iterator[Evaluation]:
    """The files `<part>.csv` below `root`, sorted by set; InputError where there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; --against takes one with evaluation sets in it, such as GUE")
    folders = sorted({path.parent for part in PARTS for path in root.rglob(f"{part}.csv")})
    if not folders:
        raise InputError(f"{root}: no {', '.join(f'{part}.csv' for part in PARTS)} in it or in its folders")
    files = [(folder, part) for folder in folders for part in parts if (folder / f"{part}.csv").is_file()]
    if not files:
        raise InputError(f"{root}: its {len(folders)} evaluation sets have no {', '.join(parts)}; choose other --parts")
    if len(files) < len(folders) * len(parts):
        log(f"{root}: {len(folders) * len(parts) - len(files)} of {len(folders) * len(parts)} files are not there")
    for folder, part in files:
        name = folder.relative_to(root).as_posix()
        yield read_evaluation(folder / f"{part}.csv", root.resolve().name if name == "." else name, part)


def read_evaluation(path: Path, name: str, part: str) -> Evaluation:
    """Read one CSV file: every column that has DNA (see `is_dna`) in any of the first 100 rows.

    So `sequence` of GUE, and both sequences of its pairs, whatever their columns are called; columns of other names than
    `sequence` are logged.
    """
    stretches, owner, sequences, bases = list[bytes](), list[int](), 0, 0
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            rows = ((reader.line_num, row) for row in reader if row)
            first = list(islice(rows, ROWS_TO_CHOOSE))
            columns = sorted({column for _, row in first for column, value in enumerate(row) if is_dna(value.strip())})
            if first and not columns:
                raise InputError(f"{path}: no column has a sequence of DNA in its first {len(first)} rows")
            names = [header[column].strip() if column < len(header) else f"number {column + 1}" for column in columns]
            if names != USUAL:
                log(f"{path}: searched for its columns {', '.join(names)}")
            for line, row in chain(first, rows):
                for column in columns:
                    if column >= len(row):
                        raise InputError(f"{path}, line {line}: {len(row)} fields; other rows have more")
                    text = row[column].strip().upper().encode("ascii", "replace")
                    found = _BETWEEN_CUTS.findall(text)
                    stretches += found
                    owner += [sequences] * len(found)
                    bases += len(text)
                sequences += 1
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a text file in UTF-8 ({error.reason}); write it again") from None
    return Evaluation(name, part, sequences, bases, Texts.of(stretches), np.array(owner, dtype=np.int64))


def is_dna(text: str) -> bool:
    """8 letters or more, all of them bases or codes of IUPAC, and half of them A, C, G, T or N: "backwards" is a word."""
    return bool(_DNA.fullmatch(text)) and 2 * len(_BASES.findall(text)) >= len(text)
