"""Sequences to tokens: "[CLS] A [SEP]", and "[CLS] A [SEP] B [SEP]" for pairs, truncated only where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.cli import InputError
from data_prep.codec import TextEncoder
from data_prep.dataset import SPECIALS
from data_prep.tokenizing.kmer_tokenizer import OVERLAPPING
from finetune.data import Rows
from kernels import MAX_SEQUENCE

_AT_ONCE = 4096  # sequences; an encoding takes about 100 bytes a token until its ids are copied out


@dataclass(frozen=True)
class Tokens:
    """The tokens of all rows of a split, end to end, with [CLS] first and [SEP] last in each."""

    ids: NDArray[np.int32]  # [tokens]
    starts: NDArray[np.int64]  # [rows + 1] where each row starts
    labels: NDArray[Any]  # [rows]
    truncated: int  # rows that were cut
    seconds: NDArray[np.int64] | None = None  # [rows] where the second sequence of each pair starts

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


class Encoder:
    """A model's tokenizer as fine-tuning needs it.

    Raises InputError for a tokenizer without [CLS] or [SEP].
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.cls, self.sep = (_special(tokenizer, token) for token in ("[CLS]", "[SEP]"))
        self.content, self.vocab_size = TextEncoder(tokenizer), vocab_size
        self.overlapping = self.content.kind == OVERLAPPING  # whether a base stands in several tokens
        self.least_bases = (self.content.k or 1) if self.overlapping else 1  # fewer have no token
        longest = max((len(token) for token in tokenizer.get_vocab() if token not in SPECIALS), default=1)
        self.most_bases = MAX_SEQUENCE * longest  # more are over the longest sequence whatever the letters are

    def split(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """Content tokens of each text."""
        parts: list[NDArray[np.integer[Any]]] = []
        for first in range(0, len(texts), _AT_ONCE):
            tokens, counts = self.content(texts[first : first + _AT_ONCE])
            parts += np.split(tokens, np.cumsum(counts)[:-1])
        return parts


def tokenize(rows: Rows, tokenizer: Tokenizer, vocab_size: int, max_length: int | None, most: int = MAX_SEQUENCE) -> Tokens:
    """Tokens of every row; one over `max_length` tokens, with [CLS] and [SEP], loses its end and is counted.

    `most` is what the model takes. Of a pair the longer sequence is cut, as by the published scripts (`longest_first`).
    Raises InputError: a sequence without tokens, a token beyond the model's vocabulary, a row longer than the model takes.
    """
    encoder = Encoder(tokenizer, vocab_size)
    columns = [encoder.split(texts) for texts in (rows.sequences, rows.seconds) if texts is not None]
    limit = (most if max_length is None else min(max_length, most)) - 1 - len(columns)
    truncated = 0
    for row, parts in enumerate(zip(*columns, strict=True)):
        for part, texts in zip(parts, (rows.sequences, rows.seconds or []), strict=False):
            if not len(part):
                kmers = f" of {encoder.content.k}-mers" if encoder.content.k else ""
                raise InputError(
                    f"{rows.where(row)}: {texts[row]!r} has no token under the model's tokenizer{kmers}; remove the row"
                )
        total = sum(map(len, parts))
        if total > limit:
            if max_length is None:
                raise InputError(
                    f"{rows.where(row)}: {total} tokens, the model takes {limit}; give --max-length to truncate"
                )
            truncated += 1
            for column, length in zip(columns, _cut([len(part) for part in parts], limit), strict=True):
                column[row] = column[row][:length]
    return _assemble(rows, columns, encoder, truncated)


def _cut(lengths: list[int], limit: int) -> list[int]:
    """Lengths that sum to `limit`; the longer of two is cut, both where the shorter one alone is over half."""
    if len(lengths) == 1:
        return [limit]
    shorter = min(*lengths, limit // 2)
    return [shorter, limit - shorter] if lengths[0] <= lengths[1] else [limit - shorter, shorter]


def _assemble(rows: Rows, columns: list[list[NDArray[np.integer[Any]]]], encoder: Encoder, truncated: int) -> Tokens:
    """[CLS], then each column's tokens with a [SEP] after them."""
    sizes = [np.array([len(part) + 1 for part in column], dtype=np.int64) for column in columns]
    starts = np.zeros(len(rows.sequences) + 1, dtype=np.int64)
    np.cumsum(1 + sum(sizes), out=starts[1:])
    ids = np.empty(starts[-1], dtype=np.int32)
    ids[starts[:-1]] = encoder.cls
    begin = starts[:-1] + 1
    for column, size in zip(columns, sizes, strict=True):
        for part, start in zip(column, begin.tolist(), strict=True):
            ids[start : start + len(part)] = part
        begin = begin + size
        ids[begin - 1] = encoder.sep
    if len(ids) and int(ids.max()) >= encoder.vocab_size:
        row = int(np.searchsorted(starts, int((ids >= encoder.vocab_size).argmax()), side="right")) - 1
        raise InputError(
            f"{rows.where(row)}: the tokenizer gives token {int(ids.max())}, but the model has "
            f"{encoder.vocab_size}; tokenizer and weights don't belong together"
        )
    return Tokens(ids, starts, rows.labels, truncated, starts[:-1] + 1 + sizes[0] if len(columns) == 2 else None)


def _special(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InputError(f"the model's tokenizer has no token {token}; fine-tuning needs one in front or at the end")
    return int(number)
