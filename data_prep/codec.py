"""A tokenizer file, as sequences of genomes need it: text to tokens, tokens to bases, and how many bases a token covers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.cli import InputError, StopRequested
from data_prep.dataset import SPECIALS
from data_prep.tokenizing.kmer_tokenizer import OVERLAPPING, read_kmers

RUN_BASES = 8_192  # of text tokenized at once: the library's fastest length, and a token seldom reaches over its edge


def open_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json that neither truncates nor pads, whatever the file says. InputError where it is none."""
    data = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except StopRequested:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{file}: not a Hugging Face tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextEncoder:
    """Turns plain text into tokens, for every kind of tokenizer: all that have plain text use this.

    `tokenizers` itself would make one [UNK] of a text that should be cut into overlapping k-mers.

    Attributes:
        kind: `bpe`, `kmer`, `overlapping-kmer`, or what the file calls its model (`unigram`).
        k: letters of a k-mer; None for the kinds without.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` must not truncate or pad."""
        contents = json.loads(tokenizer.to_str())
        self._tokenizer, self._kmers = tokenizer, read_kmers(contents)
        self.kind = self._kmers.kind if self._kmers else str(contents["model"]["type"]).lower()
        self.k = self._kmers.k if self._kmers else None
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self._dtype: type[np.integer[Any]] = np.uint16 if largest < 1 << 16 else np.int32

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Content tokens of all texts, one after the other [tokens], and how many each text has [texts].

        Letters other than A, C, G, T are [UNK], in most tokenizers. Overlapping k-mers: a text of n letters has
        max(0, n - k + 1) tokens.
        """
        if self._kmers:
            return self._kmers.encode(texts)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        counts = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, self._dtype, int(counts.sum())), counts


class Codec:
    """A tokenizer file.

    Attributes:
        kind, k: as in TextEncoder.
        data: the file's bytes; `sha256` is theirs.
        token_bases: int64 [vocabulary], bases by which each token moves on; 0 for special tokens.
        overlap: bases that a sequence covers beyond the sum of its `token_bases`: k - 1 for overlapping k-mers, else 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        try:
            tokenizer = Tokenizer.from_str(self.data.decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._encode = TextEncoder(tokenizer)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise InputError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIALS if token not in vocabulary]
        if missing:
            raise InputError(f"{path}: the tokenizer has no token {', '.join(missing)}")
        for number, token in enumerate(SPECIALS):
            if vocabulary[token] != number:
                raise InputError(
                    f"{path}: {token} is token {vocabulary[token]}, but training takes it to be {number}; "
                    f"number {' '.join(SPECIALS)} from 0 to {len(SPECIALS) - 1}"
                )
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 1 << 16:
            raise InputError(f"{path}: {self.vocab_size} tokens, but the dataset stores uint16; use at most 65536")
        self.kind, self.k = self._encode.kind, self._encode.k
        self.overlap = self.k - 1 if self.k is not None and self.kind == OVERLAPPING else 0
        self.token_bases = np.zeros(self.vocab_size, dtype=np.int64)
        self._letters = [b""] * self.vocab_size  # of each token
        for token, number in vocabulary.items():
            if token not in SPECIALS:
                self._letters[number] = token.encode()
                self.token_bases[number] = len(token) - self.overlap

    def encode(self, runs: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Content tokens of all runs, one after the other [tokens], and how many each run has [runs].

        A run has only A, C, G, T. Runs of fewer than k bases have no token if k-mers overlap. Raises InputError when the
        tokens do not spell the runs.
        """
        tokens, counts = self._encode(runs)
        spelled = int(self.token_bases[tokens].sum()) + self.overlap * int(np.count_nonzero(counts))
        if spelled != sum(size for size in map(len, runs) if size > self.overlap):
            raise InputError(f"{self.path}: the tokenizer does not spell every run of A, C, G, T; train one on genomes")
        return tokens, counts

    def run_bases(self, content: int) -> int:
        """Bases of a run, the piece of text that is tokenized by itself, for sequences of `content` tokens.

        With overlapping k-mers a run makes one sequence, so that no base stands in two. Runs of others are whole k-mers:
        only the last of a piece has a remainder.
        """
        if self.kind == OVERLAPPING:
            return content + self.overlap
        return RUN_BASES // self.k * self.k if self.k else RUN_BASES

    def spans(self, tokens: NDArray[np.uint16], lengths: NDArray[np.uint16]) -> NDArray[np.int64]:
        """Bases that each sequence covers [sequences]. `tokens` [tokens] of all, `lengths` [sequences] none of them 0."""
        first = np.cumsum(lengths, dtype=np.int64) - lengths
        return np.add.reduceat(self.token_bases[tokens], first) + self.overlap if len(lengths) else np.empty(0, np.int64)

    def decode(self, tokens: NDArray[np.uint16]) -> bytes:
        """The bases of one sequence's content tokens."""
        letters = [self._letters[token] for token in tokens.tolist()]
        if self.overlap:  # each k-mer adds its last base to the one before
            return b"".join(letters[:1]) + b"".join([word[-1:] for word in letters[1:]])
        return b"".join(letters)
