"""A tokenizer file, as sequences of genomes need it: text to tokens, tokens to bases, and how many bases a token covers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.cli import InputError
from data_prep.dataset import SPECIALS

RUN_BASES = 8_192  # of text tokenized at once: the library's fastest length, and a token seldom reaches over its edge


class Codec:
    """A tokenizer file.

    Attributes:
        kind: `bpe`.
        data: the file's bytes; `sha256` is theirs.
        token_bases: int64 [vocabulary], bases by which each token moves on; 0 for special tokens.
        overlap: bases that a sequence covers beyond the sum of its `token_bases`: k - 1 for overlapping k-mers, else 0.
    """

    overlap = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        try:
            self.kind = str(json.loads(self.data)["model"]["type"]).lower()
            self._tokenizer = Tokenizer.from_str(self.data.decode())
        except Exception as error:  # tokenizers raises bare Exceptions
            raise InputError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        missing = [token for token in SPECIALS if self._tokenizer.token_to_id(token) is None]
        if missing:
            raise InputError(f"{path}: the tokenizer has no token {', '.join(missing)}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 1 << 16:
            raise InputError(f"{path}: {self.vocab_size} tokens, but the dataset stores uint16; use at most 65536")
        self.token_bases = np.zeros(self.vocab_size, dtype=np.int64)
        self._letters = [b""] * self.vocab_size  # of each token
        for token, number in vocabulary.items():
            if token not in SPECIALS:
                self.token_bases[number], self._letters[number] = len(token), token.encode()

    def encode(self, runs: list[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Content tokens of all runs, one after the other [tokens], and how many each run has [runs]."""
        encodings = self._tokenizer.encode_batch_fast(runs, add_special_tokens=False)
        arrays = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
        counts = np.array([len(array) for array in arrays], dtype=np.int64)
        tokens = np.concatenate(arrays)
        if int(self.token_bases[tokens].sum()) != sum(map(len, runs)):
            raise InputError(f"{self.path}: the tokenizer does not spell every run of A, C, G, T; train one on genomes")
        return tokens, counts

    def run_bases(self, content: int) -> int:
        """Bases of a run, the piece of text that is tokenized by itself, for sequences of `content` tokens."""
        return RUN_BASES

    def spans(self, tokens: NDArray[np.uint16], lengths: NDArray[np.uint16]) -> NDArray[np.int64]:
        """Bases that each sequence covers [sequences]. `tokens` [tokens] of all, `lengths` [sequences] none of them 0."""
        first = np.cumsum(lengths, dtype=np.int64) - lengths
        return np.add.reduceat(self.token_bases[tokens], first) + self.overlap if len(lengths) else np.empty(0, np.int64)

    def decode(self, tokens: NDArray[np.uint16]) -> bytes:
        """The bases of one sequence's content tokens."""
        letters = self._letters
        return b"".join([letters[token] for token in tokens.tolist()])
