"""Cuts regions at anything but A, C, G, T, tokenizes what lies between, and packs the tokens into sequences.

Pieces between two cuts are tokenized in runs (`Codec.run_bases`) and the tokens laid end to end, so that truncation throws
nothing away. Only a piece's last sequence may be short; under `MINIMUM_TOKENS` it is dropped and counted. This packing is
called `contiguous`; the other one, `paper`, is that of the DNABERT-2 paper: pieces of 1,000 bases, those with another letter
left out, each tokenized by itself and truncated to one sequence.

A sequence's place in the genome is exact: each token stands for as many bases as its string has letters. That every
run's tokens spell as many bases as went in is checked, which also finds unknown tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.codec import Codec
from data_prep.kmers import reverse_complement

PACKINGS = ("contiguous", "paper")
PAPER_PIECE_BASES = 1_000
STRANDS = ("forward", "both")
MINIMUM_TOKENS = 8
BATCH_BASES = 1 << 20  # tokenized at a time: enough runs for every core; an encoding takes about 100 bytes a token
# Why bases of the genomes stand in no sequence; the last three are decided by `finalize`.
DROPPED = ("not_acgt", "short_tail", "truncated", "duplicate", "near_duplicate", "excluded")
_BETWEEN_CUTS = re.compile(rb"[^N]+")


class Packed(NamedTuple):
    """The sequences of one piece: a stretch of A, C, G, T, read forward or as its reverse complement."""

    contig: int
    strand: int  # +1 or -1
    text: bytes  # of the piece, in the strand's direction
    start: int  # of the piece in the contig, on the forward strand
    tokens: NDArray[np.uint16]  # [tokens] content tokens of all sequences, one after the other
    lengths: NDArray[np.int64]  # [sequences] how many each has
    starts: NDArray[np.int64]  # [sequences] first base of each in `text`
    bases: NDArray[np.int64]  # [sequences] how many it covers

    def source(self) -> NDArray[np.int64]:
        """Contig, lowest base in it, strand of each sequence [sequences, 3], as in the dataset."""
        offsets = self.starts if self.strand > 0 else len(self.text) - self.starts - self.bases
        source = np.empty((len(offsets), 3), dtype=np.int64)
        source[:, 0], source[:, 1], source[:, 2] = self.contig, self.start + offsets, self.strand
        return source


Sink = Callable[[Packed], None]


class _Piece(NamedTuple):
    sink: Sink
    contig: int
    strand: int
    text: bytes
    start: int
    runs: int


@dataclass
class Tally:
    """Where the bases of some text went, on the forward strand; `total` is `kept` and all that was dropped."""

    total: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))

    @property
    def kept(self) -> int:
        """Bases that stand in a sequence."""
        return self.total - sum(self.dropped.values())

    def as_json(self) -> dict[str, object]:
        """As in markers and the manifest."""
        return {"in": self.total, "kept": self.kept, "dropped": dict(self.dropped)}


@dataclass
class Packer:
    """Packs regions in the order in which they are added; `flush` before using what was written."""

    codec: Codec
    sequence_length: int  # in tokens, with [CLS] and [SEP]
    packing: str = "contiguous"
    strands: str = "forward"
    tally: Tally = field(default_factory=Tally)
    _runs: list[str] = field(default_factory=list)
    _pieces: list[_Piece] = field(default_factory=list)
    _waiting: int = 0  # bases in _runs

    def add(self, sink: Sink, contig: int, start: int, bases: bytes) -> None:
        """Pack one region, which starts at base `start` of `contig`, into `sink`."""
        self.tally.total += len(bases)
        self.tally.dropped["not_acgt"] += bases.count(b"N")
        for first, piece in self._cut(bases):
            self._add(_Piece(sink, contig, 1, piece, start + first, 0))
            if self.strands == "both":
                self._add(_Piece(sink, contig, -1, reverse_complement(piece), start + first, 0))
        if self._waiting >= BATCH_BASES:
            self.flush()

    def _cut(self, bases: bytes) -> Iterator[tuple[int, bytes]]:
        """Start and text of each piece of a region."""
        if self.packing == "contiguous":
            yield from ((match.start(), match[0]) for match in _BETWEEN_CUTS.finditer(bases))
            return
        for start in range(0, len(bases), PAPER_PIECE_BASES):
            piece = bases[start : start + PAPER_PIECE_BASES]
            if other := piece.count(b"N"):
                self.tally.dropped["truncated"] += len(piece) - other
            else:
                yield start, piece

    def _add(self, piece: _Piece) -> None:
        text, size = piece.text.decode("ascii"), self.codec.run_bases(self.sequence_length - 2)
        if self.packing == "paper":
            size = len(text) or 1
        runs = [text[start : start + size] for start in range(0, len(text), size)]
        self._runs += runs
        self._pieces.append(piece._replace(runs=len(runs)))
        self._waiting += len(text)

    def flush(self) -> None:
        """Tokenize what waits and hand its sequences to their sinks."""
        if not self._runs:
            return
        tokens, counts = self.codec.encode(self._runs)
        run_bounds = np.concatenate([[0], np.cumsum(counts)])
        bases_before = np.concatenate([[0], np.cumsum(self.codec.token_bases[tokens])])  # [tokens + 1]
        run = 0
        for piece in self._pieces:
            self._pack(piece, tokens, int(run_bounds[run]), int(run_bounds[run + piece.runs]), bases_before)
            run += piece.runs
        self._runs, self._pieces, self._waiting = [], [], 0

    def _pack(
        self, piece: _Piece, tokens: NDArray[np.uint16], first: int, end: int, bases_before: NDArray[np.int64]
    ) -> None:
        """Cut the piece's tokens, `tokens[first:end]`, into sequences."""
        content = self.sequence_length - 2
        truncated = self.packing == "paper" and end - first > content
        if truncated:
            end = first + content
        short = (end - first) % content < MINIMUM_TOKENS
        whole_end = end - (end - first) % content if short else end
        starts_t = np.arange(first, whole_end, content)  # in tokens
        ends_t = np.minimum(starts_t + content, whole_end)
        overlap = self.codec.overlap
        starts = bases_before[starts_t] - bases_before[first] + overlap * np.arange(len(starts_t))
        bases = bases_before[ends_t] - bases_before[starts_t] + overlap
        if piece.strand > 0:
            self.tally.dropped["truncated" if truncated else "short_tail"] += len(piece.text) - int(bases.sum())
        if len(starts_t):
            content_t = tokens[first:whole_end]
            piece.sink(
                Packed(piece.contig, piece.strand, piece.text, piece.start, content_t, ends_t - starts_t, starts, bases)
            )
