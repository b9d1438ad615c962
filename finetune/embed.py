"""`python -m finetune embed`: one vector a sequence, for as many sequences as there are.

The input is read twice: names are written down and counted first, so the size of the output is known when its header is
written, and what can't be read is found before hours of computing. Then vectors go to the file in the order of the
input, some thousand at a time, and nothing grows with the input.

    FILE.safetensors   `embeddings` fp32 [sequences, hidden], with `model`, `pooling`, ... as metadata; names: FILE.names.txt
    FILE.npz           `embeddings`, `names`, and `about`: the metadata as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, log, progress, replacing
from finetune.inference import LONGEST, Opened, add_model_arguments, open_model
from finetune.model import pool
from finetune.sequences import COLUMN, Named, read_sequences
from finetune.tasks import Pooling
from kernels import MAX_SEQUENCE

BLOCK_SEQUENCES, BLOCK_LETTERS = 4096, 1 << 22  # that are sorted by length and computed together
SUFFIXES = (".safetensors", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_model_arguments(parser)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="FASTA, or CSV with a header line; plain or gzip"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.safetensors, with the names in FILE.names.txt, or FILE.npz",
    )
    parser.add_argument(
        "--pooling",
        choices=["mean", "cls"],
        default="mean",
        help="tokens to one vector: the mean of all of them with [CLS] and [SEP] (the default), or [CLS]",
    )
    parser.add_argument("--column", default=COLUMN, metavar="NAME", help=f"of a CSV file: the sequences (default: {COLUMN})")
    parser.add_argument("--window", type=int, metavar="BASES", help="cut longer sequences into windows NAME:start-end")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="cut what has more tokens, with [CLS] and [SEP]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb."""
    return embed(
        args.model,
        args.input,
        args.out,
        pooling=args.pooling,
        column=args.column,
        window=args.window,
        max_length=args.max_length,
        dtype=args.dtype,
        kernels=args.kernels,
    )


def embed(
    model: str,
    source: Path,
    out: Path,
    *,
    pooling: Pooling = "mean",
    column: str = COLUMN,
    window: int | None = None,
    max_length: int | None = None,
    dtype: str = "fp32",
    kernels: str = "auto",
) -> dict[str, Any]:
    """Write the embeddings of all sequences of `source`; see the module.

    Returns `out`, the number of `sequences`, `truncated` ones among them, and what the file's metadata say.
    Raises InputError naming file and record.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: the name must end in {' or '.join(SUFFIXES)}")
    if window is not None and window < 1:
        raise InputError(f"--window {window}: must be at least 1 base")
    if max_length is not None and not 3 <= max_length <= MAX_SEQUENCE:
        raise InputError(f"--max-length {max_length}: must be from 3 to {MAX_SEQUENCE}")
    opened = open_model(model, dtype=dtype, kernels=kernels, longest=max_length or MAX_SEQUENCE)
    read = partial(
        read_sequences,
        source,
        column=column,
        window=window,
        most=opened.encoder.most_bases,
        least=opened.encoder.least_bases,
    )
    about = opened.about() | {"pooling": pooling, "hidden": opened.config.hidden_size, "input": str(source)}
    about |= {"window": window, "max_length": max_length}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+b", dir=out.parent) as spool:
        names = _spool_names(spool, _checked(opened, read(), max_length))
        log(f"{source}: {names.count:,} sequences")
        save = _safetensors if out.suffix == ".safetensors" else _npz
        done = truncated = 0
        with save(out, names, opened.config.hidden_size, about) as write:
            for block in _blocks(progress(read(), total=names.count, unit="sequences")):
                done += len(block)
                if done > names.count:
                    break
                vectors, cut = embeddings(opened, block, pooling, max_length)
                write(vectors)
                truncated += cut
            if done != names.count:
                raise InputError(f"{source}: changed while it was read; run the command again")
    if truncated:
        log(f"{truncated:,} sequences were cut to {max_length} tokens")
    log(f"{out}: {done:,} embeddings of {opened.config.hidden_size}")
    return {"out": str(out), "sequences": done, "truncated": truncated} | about


def embeddings(
    opened: Opened, sequences: list[Named], pooling: Pooling, max_length: int | None = None
) -> tuple[NDArray[np.float32], int]:
    """One vector a sequence [sequences, hidden], and how many sequences were truncated."""
    parts, truncated = opened.encode(sequences, max_length)
    vectors = np.empty((len(parts), opened.config.hidden_size), dtype=np.float32)
    for rows, batch, states_td in opened.states(parts):
        vectors[rows] = pool(states_td, batch, pooling).float().cpu().numpy()
    return vectors, truncated


def _checked(opened: Opened, sequences: Iterable[Named], max_length: int | None) -> Iterator[Named]:
    """The sequences; those that could have no token or too many are tokenized, and refused if they do."""
    for sequence in sequences:
        if not opened.encoder.least_bases <= len(sequence.text) <= LONGEST:
            opened.encode([sequence], max_length)
        yield sequence


def _blocks(sequences: Iterable[Named]) -> Iterator[list[Named]]:
    """Some sequences at a time, as many as are held."""
    block: list[Named] = []
    letters = 0
    for sequence in sequences:
        block.append(sequence)
        letters += len(sequence.text)
        if len(block) == BLOCK_SEQUENCES or letters >= BLOCK_LETTERS:
            yield block
            block, letters = [], 0
    if block:
        yield block


@dataclass(frozen=True)
class _Names:
    """The names of all sequences, in a file."""

    stream: IO[bytes]  # one a line, UTF-8
    count: int
    longest: int  # letters


def _spool_names(stream: IO[bytes], sequences: Iterable[Named]) -> _Names:
    count, longest = 0, 1
    for sequence in sequences:
        stream.write(sequence.name.encode() + b"\n")
        count += 1
        longest = max(longest, len(sequence.name))
    return _Names(stream, count, longest)


Write = Callable[[NDArray[np.float32]], None]


@contextmanager
def _safetensors(out: Path, names: _Names, hidden: int, about: dict[str, Any]) -> Iterator[Write]:
    """The format's 8 bytes, header and rows, written one after the other."""
    size = names.count * hidden * 4
    tensor = {"dtype": "F32", "shape": [names.count, hidden], "data_offsets": [0, size]}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    header = json.dumps({"__metadata__": texts, "embeddings": tensor}).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned
    with replacing(out) as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        yield lambda vectors: _write(stream, vectors)
        with replacing(out.with_suffix(".names.txt")) as copy:
            names.stream.seek(0, os.SEEK_SET)
            shutil.copyfileobj(names.stream, copy)


@contextmanager
def _npz(out: Path, names: _Names, hidden: int, about: dict[str, Any]) -> Iterator[Write]:
    """What `numpy.savez` writes, without its arrays in memory."""
    with replacing(out) as stream, zipfile.ZipFile(stream, "w") as archive:
        with archive.open("about.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(about)), allow_pickle=False)
        with archive.open("names.npy", "w", force_zip64=True) as member:
            _header(member, f"<U{names.longest}", (names.count,))
            names.stream.seek(0, os.SEEK_SET)
            for line in names.stream:
                member.write(line[:-1].decode().ljust(names.longest, "\0").encode("utf-32-le"))
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            _header(member, "<f4", (names.count, hidden))
            yield lambda vectors: _write(member, vectors)


def _header(member: IO[bytes], descr: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})


def _write(stream: IO[bytes], vectors: NDArray[np.float32]) -> None:
    stream.write(np.ascontiguousarray(vectors, dtype="<f4").data.cast("B"))
