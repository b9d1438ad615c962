"""Cuts regions at anything but A, C, G, T, tokenizes what lies between, and packs the tokens into sequences.

Pieces between two cuts are tokenized in runs of 8,192 bases (the tokenizer's fastest length, and a token seldom
reaches over a run's edge) and the tokens laid end to end, so that truncation throws nothing away. Only a piece's last
sequence may be short; under `MINIMUM_TOKENS` it is dropped and counted.

A sequence's place in the genome is exact: each token stands for as many bases as its string has letters. That every
run's tokens spell as many bases as went in is checked, which also finds unknown tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_prep.codec import RUN_BASES, Codec

MINIMUM_TOKENS = 8
BATCH_BASES = 1 << 20  # tokenized at a time: enough runs for every core; an encoding takes about 100 bytes a token
_BETWEEN_CUTS = re.compile(rb"[^N]+")

Add = Callable[[NDArray[np.uint16], int, int], None]  # (content tokens, contig number, start in the contig)


@dataclass
class Tally:
    """Where the bases of some text went; `total == kept + not_acgt + short_tail`."""

    total: int = 0
    not_acgt: int = 0
    short_tail: int = 0

    @property
    def kept(self) -> int:
        """Bases that stand in a sequence."""
        return self.total - self.not_acgt - self.short_tail

    def as_json(self) -> dict[str, object]:
        """As in markers and the manifest."""
        dropped = {"not_acgt": self.not_acgt, "short_tail": self.short_tail}
        return {"in": self.total, "kept": self.kept, "dropped": dropped}


@dataclass
class Packer:
    """Packs regions in the order in which they are added; `flush` before using what was written."""

    codec: Codec
    sequence_length: int  # in tokens, with [CLS] and [SEP]
    tally: Tally = field(default_factory=Tally)
    _runs: list[str] = field(default_factory=list)
    _pieces: list[tuple[Add, int, int, int]] = field(default_factory=list)  # sink, contig, start, number of runs
    _waiting: int = 0  # bases in _runs

    def add(self, sink: Add, contig: int, start: int, bases: bytes) -> None:
        """Pack one region, which starts at base `start` of `contig`, into `sink`."""
        self.tally.total += len(bases)
        between = 0
        for match in _BETWEEN_CUTS.finditer(bases):
            first, last = match.span()
            text = bases[first:last].decode("ascii")
            between += last - first
            runs = [text[offset : offset + RUN_BASES] for offset in range(0, len(text), RUN_BASES)]
            self._runs += runs
            self._pieces.append((sink, contig, start + first, len(runs)))
        self.tally.not_acgt += len(bases) - between
        self._waiting += between
        if self._waiting >= BATCH_BASES:
            self.flush()

    def flush(self) -> None:
        """Tokenize what waits and hand its sequences to their sinks."""
        if not self._runs:
            return
        tokens, counts = self.codec.encode(self._runs)
        run_bounds = np.concatenate([[0], np.cumsum(counts)])
        bases_before = np.concatenate([[0], np.cumsum(self.codec.token_bases[tokens])])  # [tokens + 1]
        content, run = self.sequence_length - 2, 0
        for sink, contig, start, runs in self._pieces:
            first, end = int(run_bounds[run]), int(run_bounds[run + runs])
            run += runs
            offset = start - int(bases_before[first])
            if 0 < (end - first) % content < MINIMUM_TOKENS:
                short = end - (end - first) % content
                self.tally.short_tail += int(bases_before[end] - bases_before[short])
                end = short
            for position in range(first, end, content):
                sink(tokens[position : min(position + content, end)], contig, offset + int(bases_before[position]))
        self._runs, self._pieces, self._waiting = [], [], 0
