"""Checks one shard in one pass over its bytes: the tar, its index, and what every sequence says about itself.

The tar is read as any tar reader reads it (`tarfile`, `np.load`), not by the loader's shortcut through headers: the promise
to be kept is that of the format. Nothing is believed that was not checked before: blocks are found by an index whose sum
is the recorded one, and looked into when their own sum is right.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import one_line
from data_prep.dataset import BLOCK_ROW, SEQUENCES_PER_BLOCK
from data_prep.storage import WRONG_SUM

ARRAYS = {"lengths": np.dtype("<u2"), "source": np.dtype("<i8"), "tokens": np.dtype("<u2")}  # members of a sample
LISTED = 5  # problems of a shard that are written out
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Rules:
    """What the sequences of one species must keep to."""

    shortest: int  # content tokens of a sequence
    longest: int
    vocab_size: int
    strands: tuple[int, ...]
    token_bases: NDArray[np.int64] | None  # as in Codec; None when the tokenizer is not the dataset's
    overlap: int  # as in Codec
    first_contig: int
    contigs: int
    # [contigs + 1] Where each contig begins when all are laid end to end with a gap of one base; None when contigs.tsv is
    # damaged. One number then tells contig and base, and intervals of two contigs never touch.
    axis: NDArray[np.int64] | None

    def describe(self, place: int) -> str:
        """Contig and base of a place on the axis."""
        assert self.axis is not None
        contig = int(np.searchsorted(self.axis, place, side="right")) - 1
        return f"contig {self.first_contig + contig} base {place - int(self.axis[contig])}"


@dataclass
class Findings:
    """What a shard was found to hold, and what is wrong with it."""

    split: str
    shard: int
    species: int
    problems: list[str] = field(default_factory=list)  # one line each, with the file
    unlisted: int = 0  # further problems
    bytes: int = 0  # of the tar
    bases: int = 0  # that sequences of the forward strand cover
    # [runs, 2] int64: first and end of the stretches on the axis that its sequences cover; None: some are not known.
    runs: NDArray[np.int64] | None = None

    def add(self, path: Path, what: str) -> None:
        """Note a problem."""
        if len(self.problems) < LISTED:
            self.problems.append(f"{path}: {what}")
        else:
            self.unlisted += 1


class _Wrong(Exception):
    """The first thing that is wrong with a block or an index."""


def check_shards(dataset: Path, split: str, rows: NDArray[np.void], rules: Rules) -> list[Findings]:
    """Check the shards of one species that `rows` (SHARD_ROW) of the split's table tell of."""
    return [_check_shard(dataset / split, split, row, rules) for row in rows]


def _check_shard(directory: Path, split: str, row: np.void, rules: Rules) -> Findings:
    found = Findings(split, int(row["shard"]), int(row["species"]))
    tar = directory / f"{found.shard:06d}.tar"
    index_path = tar.with_suffix(".index.npy")
    index: NDArray[np.void] | None = None
    try:
        index = _read_index(index_path, row)
    except _Wrong as wrong:
        found.add(index_path, str(wrong))
    except OSError as error:
        found.add(index_path, _reason(error))
    try:
        sources = _read_tar(tar, index, row, rules, found)
    except OSError as error:
        found.add(tar, _reason(error))
        return found
    if sources is not None and rules.axis is not None:
        _place(tar, *sources, rules, found)
    return found


def _reason(error: OSError) -> str:
    return "not found" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror or one_line(error)})"


def _read_index(path: Path, row: np.void) -> NDArray[np.void]:
    """The shard's block table, when it is the recorded one and agrees with `row` and with itself."""
    data = path.read_bytes()
    if hashlib.sha256(data).digest() != row["index_sha256"].tobytes():
        raise _Wrong(f"{WRONG_SUM}; the shard's blocks can't be told without it")
    index = _load(data, "the table")
    if index.dtype != BLOCK_ROW or index.ndim != 1:
        raise _Wrong("is not a table of blocks")
    ends = np.cumsum(index["size"])
    for count, expected, what in (
        (len(index), row["blocks"], "blocks"),
        (index["sequences"].sum(dtype=np.uint64), row["sequences"], "sequences"),
        (index["tokens"].sum(dtype=np.uint64), row["tokens"], "tokens"),
    ):
        if count != expected:
            raise _Wrong(f"{count} {what}, but {expected} in shards.npy")
    if (index["offset"] != ends - index["size"]).any() or (len(index) and ends[-1] > row["bytes"]):
        raise _Wrong("its blocks do not lie one after the other in the tar")
    if (index["sequences"][:-1] != SEQUENCES_PER_BLOCK).any() or (index["sequences"] > SEQUENCES_PER_BLOCK).any():
        raise _Wrong(f"a block before the last does not have {SEQUENCES_PER_BLOCK} sequences")
    return index


def _load(data: bytes, what: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _Wrong(f"{what} is not a .npy array ({one_line(error)})") from None
    return array


def _read_tar(
    path: Path, index: NDArray[np.void] | None, row: np.void, rules: Rules, found: Findings
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Check the tar; return `source` and spans in bases of all its sequences, or None when some are not known."""
    before, digest, sources, spans = len(found.problems), hashlib.sha256(), [], []
    with path.open("rb") as stream:
        found.bytes = os.fstat(stream.fileno()).st_size
        expected = int(row["bytes"])
        if found.bytes != expected:
            where = ""
            if found.bytes < expected and index is not None:
                cut = int(np.searchsorted(index["offset"] + index["size"], found.bytes, side="right"))
                where = f", truncated in block {cut} of {len(index)}" if cut < len(index) else ", its end marker is missing"
            found.add(path, f"{found.bytes} bytes instead of {expected}{where}")
        for number, entry in enumerate(index if index is not None else ()):
            data = stream.read(int(entry["size"]))
            digest.update(data)
            if len(data) < entry["size"]:
                break  # said above
            try:
                if zlib.crc32(data) != entry["crc32"]:
                    raise _Wrong("crc32 differs from the recorded one")
                source, covered = _check_block(data, f"{found.shard:06d}-{number:06d}", entry, rules)
            except _Wrong as wrong:
                found.add(path, f"block {number} at offset {entry['offset']}: {wrong}")
                continue
            sources.append(source)
            spans.append(covered)
        marker = True  # the rest is zeros
        while rest := stream.read(CHUNK_BYTES):
            digest.update(rest)
            marker = marker and not any(rest)
    if len(found.problems) == before or index is None:
        if index is not None and not marker:
            found.add(path, "bytes after its last block are not a tar's end marker")
        elif digest.digest() != row["sha256"].tobytes() and found.bytes == expected:
            found.add(path, WRONG_SUM)
    if index is None or len(sources) < len(index) or rules.token_bases is None or rules.axis is None:
        return None
    return np.concatenate(sources), np.concatenate(spans)


def _check_block(data: bytes, key: str, entry: np.void, rules: Rules) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`source` [sequences, 3] of a block, and the bases that each sequence covers (0s without a tokenizer)."""
    arrays = _read_sample(data, key)
    tokens, lengths, source = arrays["tokens"], arrays["lengths"], arrays["source"]
    if tokens.ndim != 1 or lengths.ndim != 1 or source.shape != (len(lengths), 3):
        raise _Wrong(f"shapes {tokens.shape}, {lengths.shape}, {source.shape} of tokens, lengths, source do not fit")
    for count, field_name in ((len(lengths), "sequences"), (len(tokens), "tokens")):
        if count != entry[field_name]:
            raise _Wrong(f"{count} {field_name}, but {entry[field_name]} in the index")
    if len(lengths) == 0 or lengths.sum(dtype=np.int64) != len(tokens):
        raise _Wrong(f"{len(tokens)} tokens, but its sequences' lengths add up to {lengths.sum(dtype=np.int64)}")
    few, many = max(1, rules.shortest), rules.longest
    _sequences((lengths < few) | (lengths > many), lengths, f"length in tokens is not {few} to {many}, but")
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    if (foreign := tokens >= rules.vocab_size).any():
        which = np.searchsorted(first, np.flatnonzero(foreign)[0], side="right") - 1
        token, size = tokens[foreign][0], rules.vocab_size
        raise _Wrong(f"sequence {which}: token {token} is not of the tokenizer, which has {size}; is it a foreign one?")
    spans = np.zeros(len(lengths), np.int64)
    if rules.token_bases is not None:
        bases = rules.token_bases[tokens]
        _sequences(
            np.minimum.reduceat(bases, first) < 1, tokens[first], "holds a token that stands for no bases; first token"
        )
        spans = np.add.reduceat(bases, first) + rules.overlap
    contig, start, strand = source.T
    _sequences(~np.isin(strand, rules.strands), strand, "strand")
    begin, end = rules.first_contig, rules.first_contig + rules.contigs
    _sequences((contig < begin) | (contig >= end), contig, f"its species has the contigs {begin} to {end - 1}, not")
    if rules.axis is not None:
        length = np.diff(rules.axis)[contig - begin] - 1
        _sequences((start < 0) | (start + spans > length), start, "reaches beyond its contig; start")
    return source, spans


def _sequences(wrong: NDArray[np.bool_], values: NDArray[Any], what: str) -> None:
    """Raise _Wrong naming the first of the sequences that are `wrong`."""
    if len(numbers := np.flatnonzero(wrong)):
        more = f" (and {len(numbers) - 1} more sequences)" if len(numbers) > 1 else ""
        raise _Wrong(f"sequence {numbers[0]}: {what} {values[numbers[0]]}{more}")


def _read_sample(data: bytes, key: str) -> dict[str, NDArray[Any]]:
    """The arrays of a tar sample."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name: (member, tar.extractfile(member)) for member in tar}
            names = [f"{key}.{array}.npy" for array in ARRAYS]
            if sorted(members) != names:
                raise _Wrong(f"has the members {', '.join(members)} instead of {', '.join(names)}")
            arrays = {}
            for name, (array, dtype) in zip(names, ARRAYS.items(), strict=True):
                member, stream = members[name]
                if stream is None or member.mtime != 0:
                    raise _Wrong(f"{name} is no plain file with mtime 0")
                arrays[array] = _load(stream.read(), name)
                if arrays[array].dtype != dtype:
                    raise _Wrong(f"{name} is {arrays[array].dtype}, not {dtype}")
    except tarfile.TarError as error:
        raise _Wrong(f"is not a tar ({one_line(error)})") from None
    return arrays


def _place(path: Path, source: NDArray[np.int64], spans: NDArray[np.int64], rules: Rules, found: Findings) -> None:
    """Set `bases` and `runs`, and check that no base stands in two sequences of one strand."""
    assert rules.axis is not None
    starts = rules.axis[source[:, 0] - rules.first_contig] + source[:, 1]
    found.bases = int(spans[source[:, 2] == 1].sum())
    for strand in rules.strands:
        mine = source[:, 2] == strand
        first, end = by_start(starts[mine], starts[mine] + spans[mine])
        wrong = np.flatnonzero(first[1:] < np.maximum.accumulate(end)[:-1])
        if len(wrong):
            place = rules.describe(int(first[wrong[0] + 1]))
            found.add(path, f"{len(wrong)} sequences of strand {strand} overlap the one before; the first is at {place}")
    first, end = by_start(starts, starts + spans)
    reach = np.maximum.accumulate(end)
    apart = np.flatnonzero(first[1:] > reach[:-1])
    found.runs = np.column_stack([first[np.append(0, apart + 1)], reach[np.append(apart, len(reach) - 1)]])


def by_start(first: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Intervals in the order of their first base."""
    order = np.argsort(first, kind="stable")
    return first[order], end[order]
