"""Reads the sequences of evaluation sets such as GUE: folders with train.csv, dev.csv and test.csv."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.audit.matches import Texts
from data_prep.cli import InputError, log

PARTS = ("train", "dev", "test")
_DNA = re.compile(r"[ACGTNacgtn]{8,}")
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
    """Read one CSV file: every column whose first value is 8 letters or more of A, C, G, T and N, of any case.

    So `sequence` of GUE, and both sequences of its pairs, whatever their columns are called.
    """
    stretches, owner, sequences, bases = list[bytes](), list[int](), 0, 0
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            next(reader, None)
            columns: list[int] | None = None
            for row in filter(None, reader):
                if columns is None:
                    columns = [number for number, value in enumerate(row) if _DNA.fullmatch(value.strip())]
                    if not columns:
                        raise InputError(f"{path}, line {reader.line_num}: no column has a sequence of A, C, G, T and N")
                for column in columns:
                    if column >= len(row):
                        raise InputError(f"{path}, line {reader.line_num}: {len(row)} fields; the first row has more")
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
