"""The numbers of a dataset's report: of each species, of categories, of any other set of species."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from data_prep.dataset import SPLITS
from data_prep.pack import DROPPED
from data_prep.report.plots import GROUPS
from data_prep.report.sample import Sample


class Tables:
    """Sums over species.

    Attributes:
        species: the manifest's species table.
        order: numbers of all species, the one with most training tokens first.
        categories: numbers of the species of each category, the largest category first.
        groups: the same as plots show it: the largest categories, and the others as one.
        total: `of` all species.
    """

    def __init__(self, species: list[dict[str, Any]], sample: Sample) -> None:
        self.species, self._sample = species, sample
        self._train_tokens = np.array([row["tokens"]["train"] for row in species], np.float64)
        self.order: list[int] = np.argsort(-self._train_tokens, kind="stable").tolist()
        members: dict[str, list[int]] = {}
        for number in self.order:
            members.setdefault(species[number]["category"], []).append(number)
        self.categories = dict(sorted(members.items(), key=lambda item: -self._train_tokens[item[1]].sum()))
        self.groups = dict(list(self.categories.items())[:GROUPS])
        if rest := list(self.categories.values())[GROUPS:]:
            self.groups[f"{len(rest)} others"] = [number for numbers in rest for number in numbers]
        self.total = self.of(range(len(species)))

    def of(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Sums over species given by their numbers.

        Besides sums: `train_percent`, their share of the training tokens; `bases_per_token` and `gc_percent` of their
        training data, from the sample, each species by its tokens; None without training data.
        """
        chosen = list(numbers)
        rows, told = [self.species[number] for number in chosen], self._train_tokens[chosen]
        of_sample = told / np.maximum(1, self._sample.tokens[chosen])
        bases, gc = float(of_sample @ self._sample.bases[chosen]), float(of_sample @ self._sample.gc[chosen])
        tokens = float(told.sum())
        return {
            "species": len(rows),
            "contigs": sum(row["contigs"] for row in rows),
            "bases_in": sum(row["bases"]["in"] for row in rows),
            "bases_kept": sum(row["bases"]["kept"] for row in rows),
            **{reason: sum(row["bases"]["dropped"][reason] for row in rows) for reason in DROPPED},
            **{
                f"{key}_{split}": sum(row[key][split] for row in rows) for key in ("sequences", "tokens") for split in SPLITS
            },
            "train_percent": 100 * tokens / max(1.0, float(self._train_tokens.sum())),
            "bases_per_token": round(bases / tokens, 4) if tokens else None,
            "gc_percent": round(100 * gc / bases, 3) if bases else None,
        }

    def tsv(self) -> str:
        """All species, a row each, the largest first; unknown values are empty."""
        lines = []
        for number in self.order:
            row, sums = self.species[number], self.of([number])
            del sums["species"]
            lines.append({key: row[key] for key in ("name", "category", "file", "file_sha256")} | sums)
        rows = [["" if value is None else str(value) for value in line.values()] for line in lines]
        return "".join("\t".join(row) + "\n" for row in [list(lines[0]), *rows])

    def largest(self, rows: int) -> list[tuple[str, str, list[int]]]:
        """Rows of a table of species: name, category, numbers. Those after the `rows` largest are added up by category."""
        rest = set(self.order[rows:])
        table = [(self.species[number]["name"], self.species[number]["category"], [number]) for number in self.order[:rows]]
        for category, numbers in self.categories.items():
            if others := [number for number in numbers if number in rest]:
                table.append((f"({len(others):,} more)", category, others))
        return table
