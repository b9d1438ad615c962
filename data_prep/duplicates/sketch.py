"""What the search for duplicates must know of each sequence: a hash of its whole text, and a seeded sketch of its k-mers.

The sketch takes about one 24-mer in 12, chosen by the 8-mer in its middle: one look into a table of 65,536 a position, where
hashing every 24-mer by numpy takes ten times as long. The table says the same of an 8-mer and of its reverse complement, so
both strands, every phase of the packing and every genome choose the same 24-mers (sampling by content, as with the syncmers
of Edgar 2021, PeerJ 9:e10805; from such a sample containment is estimated as in Irber et al. 2022, sourmash).

A 24-mer belongs to the sequence in which it starts, also where it reaches into the next: the packed windows of a copy have
another phase, and what spans two kept windows must be known too. All its bases must lie in sequences, so that what the
packer leaves out (short tails, the rest of a truncated piece) counts nowhere.

A unit leaves two files:

    unit-000012.sequences.npy   a row a sequence (SEQUENCE_ROW): validation first, then training, each by its number
    unit-000012.hashes.npy      uint64, sorted, distinct: 40 bits of a 24-mer's hash, then 24 bits of the sequence's row

Sorted by hash, so that a range of hashes is one slice of a memory map. Of 40 bits, one hash in 400 meets another of a
corpus of 32 Gb by chance, while a duplicate needs most of its 48.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, write_atomically
from data_prep.dataset import SPLITS, npy_bytes
from data_prep.kmers import encode_bases, forward_words, mix

WORD = 24  # bases of a k-mer: long enough that two equal ones have one origin, short enough to fit between differences
CHOICE = 8  # bases in its middle, which choose it
DENSITY = 1 / 12
HASH_BITS, ROW_BITS = 40, 24
CHUNK_BASES = 1 << 17  # hashed at a time: arrays that stay in the cache
VALID = SPLITS.index("valid")
SEQUENCE_ROW = np.dtype(
    [
        ("split", "u1"),  # index in SPLITS
        ("number", "<u4"),  # of the sequence in its shard
        ("bases", "<u4"),  # that it covers
        ("hashes", "<u4"),  # distinct ones in its sketch
        ("exact", "<u8"),  # hash of its text, the same for the reverse complement
    ]
)


def sequences_path(directory: Path, unit: int) -> Path:
    """The table of a unit's sequences."""
    return directory / f"unit-{unit:06d}.sequences.npy"


def hashes_path(directory: Path, unit: int) -> Path:
    """The sketches of a unit's sequences."""
    return directory / f"unit-{unit:06d}.hashes.npy"


class Sketcher:
    """Sketches the forward sequences of one unit. Equal seeds and calls give equal files."""

    def __init__(self, seed: int, *, near: bool = True) -> None:
        """`seed` chooses the k-mers and is one for the whole dataset. Without `near` only whole texts are hashed."""
        self._near = near
        self._salt = mix(np.array([seed % (1 << 64)], dtype=np.uint64))[0]
        self._reverse = _reverse_complements(CHOICE)
        words = np.arange(4**CHOICE, dtype=np.uint16)
        canonical = np.minimum(words, self._reverse).astype(np.uint64)
        self._chosen = mix(canonical ^ self._salt) < np.uint64(DENSITY * 2**64)
        self._rows: list[list[NDArray[np.void]]] = [[] for _ in SPLITS]  # SEQUENCE_ROW without `hashes`
        self._keys: list[list[NDArray[np.uint64]]] = [[] for _ in SPLITS]  # hash, then row among those of the split
        self._sequences = [0 for _ in SPLITS]  # in _rows
        self._waiting: list[tuple[int, bytes, NDArray[np.int64], NDArray[np.int64]]] = []  # pieces of one split
        self._split, self._bases = 0, 0  # of what waits

    def add(self, split: int, first_number: int, text: bytes, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Take the sequences of one piece.

        Args:
            split: index in SPLITS.
            first_number: number of the first sequence in its shard; the others follow.
            text: the piece, only A, C, G, T.
            starts: where each sequence begins in it, in bases, ascending. int64 [sequences].
            lengths: bases that each covers. int64 [sequences].
        """
        if split != self._split:
            self._flush()
        self._split = split
        self._waiting.append((first_number, text, starts, lengths))
        self._bases += len(text)
        if self._bases >= CHUNK_BASES:  # not each piece by itself: a draft assembly has many small ones
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        # One letter goes between two pieces, so that the last sequence of one does not touch the first of the next.
        text, offset = b"A".join(text for _, text, _, _ in self._waiting), 0
        parts = []  # begin, end and number of the sequences of each piece
        for first_number, piece, starts, lengths in self._waiting:
            begin = starts + offset
            parts.append(np.stack([begin, begin + lengths, first_number + np.arange(len(starts))]))
            offset += len(piece) + 1
        begin, end, number = np.concatenate(parts, axis=1)
        rows = np.zeros(len(begin), dtype=SEQUENCE_ROW)
        rows["split"], rows["number"], rows["bases"] = self._split, number, end - begin
        codes = encode_bases(text)
        rows["exact"] = _exact_hashes(codes, begin, end)
        self._rows[self._split].append(rows)
        if self._near and len(begin):
            self._sketch(codes, begin, end)
        self._sequences[self._split] += len(rows)
        self._waiting, self._bases = [], 0

    def _sketch(self, text: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
        """Append the keys of the sequences text[begin:end], whose bases are 0 to 3."""
        bits = np.uint64(ROW_BITS)
        last = np.flatnonzero(np.append(begin[1:] > end[:-1], True))  # sequences after which there is a gap
        covered = end[last[np.searchsorted(last, np.arange(len(begin)))]]  # where the gap after each sequence begins
        for start in range(0, len(text), CHUNK_BASES):
            codes = text[start : start + CHUNK_BASES + WORD - 1]
            words = forward_words(codes, CHOICE, np.uint16)
            middle, right = (WORD - CHOICE) // 2, WORD - CHOICE
            positions = np.flatnonzero(self._chosen.take(words[middle : max(middle, len(codes) - WORD + 1 + middle)]))
            bounds = np.searchsorted(positions, begin - start)  # few sequences begin where many positions are
            row = np.repeat(np.arange(-1, len(begin)), np.diff(bounds, prepend=0, append=len(positions)))
            inside = (row >= 0) & (positions + start < end[row]) & (positions + start + WORD <= covered[row])
            positions, row = positions[inside], row[inside]
            parts = words[positions], words[positions + middle], words[positions + right]
            hashes = mix(np.minimum(_joined(*parts), _joined(*(self._reverse[part] for part in parts[::-1]))) ^ self._salt)
            self._keys[self._split].append(hashes >> bits << bits | (row + self._sequences[self._split]).astype(np.uint64))

    def write(self, directory: Path, unit: int) -> None:
        """Write the unit's two files, atomically; the caller syncs the folder.

        Raises InputError if the unit holds more sequences than a row number can tell.
        """
        self._flush()
        sequences = sum(self._sequences)
        if sequences >= 1 << ROW_BITS:
            raise InputError(
                f"unit {unit} has {sequences:,} sequences, and duplicates are found among at most "
                f"{(1 << ROW_BITS) - 1:,}; choose a smaller --unit-bases"
            )
        order = (VALID, *(split for split in range(len(SPLITS)) if split != VALID))
        rows, keys, before = [np.empty(0, SEQUENCE_ROW)], [np.empty(0, np.uint64)], 0
        for split in order:
            rows += self._rows[split]
            keys += [each + np.uint64(before) for each in self._keys[split]]
            before += self._sequences[split]
        table, sketches = np.concatenate(rows), np.concatenate(keys)
        sketches.sort()
        first = np.ones(len(sketches), dtype=np.bool_)
        np.not_equal(sketches[1:], sketches[:-1], out=first[1:])
        sketches = sketches[first]  # distinct
        row = (sketches & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)
        table["hashes"] = np.bincount(row, minlength=len(table))
        write_atomically(hashes_path(directory, unit), npy_bytes(sketches.astype("<u8", copy=False)), sync_directory=False)
        write_atomically(sequences_path(directory, unit), npy_bytes(table), sync_directory=False)


def _reverse_complements(k: int) -> NDArray[np.uint16]:
    """The reverse complement of every word of k bases. uint16 [4 ** k]."""
    words = np.arange(4**k, dtype=np.uint16)
    reverse = np.zeros_like(words)
    for base in range(k):
        reverse = reverse << np.uint16(2) | (words >> np.uint16(2 * base) & np.uint16(3)) ^ np.uint16(3)
    return reverse


def _joined(left: NDArray[np.uint16], middle: NDArray[np.uint16], right: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """Words of three times CHOICE bases from their parts."""
    bits = np.uint64(2 * CHOICE)
    return (left.astype(np.uint64) << bits | middle.astype(np.uint64)) << bits | right.astype(np.uint64)


def _exact_hashes(codes: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each codes[begin:end], the same for its reverse complement. uint64 [sequences]."""
    text, other, size = codes.tobytes(), (3 - codes[::-1]).tobytes(), len(codes)
    digests = [
        hashlib.blake2b(min(text[start:stop], other[size - stop : size - start]), digest_size=8).digest()
        for start, stop in zip(begin.tolist(), end.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8")
