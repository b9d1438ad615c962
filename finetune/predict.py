"""Classes, or numbers, of new sequences by a fine-tuned model: `python -m finetune predict`.

The model is a directory that `finetune run --export` wrote. Sequences are read, predicted and written some thousands at a
time, so memory doesn't depend on their number.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.cli import InputError, log, replacing
from finetune.data import Rows
from finetune.export import FineTuned, read_fine_tuned
from finetune.sequences import Named, has_other_letters, is_fasta, read_sequences
from finetune.tasks import Settings
from finetune.tokens import Encoder, tokenize
from finetune.train import predict as outputs_of
from kernels import MAX_SEQUENCE
from pretrain.implementations import choose_alone

AT_ONCE = 4096  # sequences


@dataclass(frozen=True)
class _Input:
    """One sequence, or a pair."""

    first: Named
    second: Named | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="HF_DIR", help="a fine-tuned model, made by `finetune run --export`"
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="FASTA or CSV, plain or gzip")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.csv", help="a row a sequence, in the order of the input"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="of a CSV file: the column of sequences, or the two of pairs (default: those that the model was trained on)",
    )
    parser.add_argument(
        "--window", type=int, metavar="BASES", help="cut longer sequences into windows, each predicted alone"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="truncate, [CLS] and [SEP] included (default: never)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrix products (default: fp32)")
    parser.add_argument(
        "--kernels", choices=["auto", "triton", "torch"], default="auto", help="who computes (default: auto)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb; returns what `--json` prints."""
    if args.out.is_dir():
        raise InputError(f"{args.out}: is a folder; name a file")
    tuned = read_fine_tuned(args.model)
    columns = args.columns or tuned.columns
    if len(columns) != len(tuned.columns):
        kinds = {1: "single sequences", 2: f"pairs ({' and '.join(tuned.columns)})"}
        raise InputError(
            f"{args.model}: was trained on {kinds[len(tuned.columns)]}; "
            f"--columns {' '.join(columns)}: name {len(tuned.columns)}"
        )
    if args.window is not None and (args.window < 1 or len(columns) == 2):
        raise InputError(f"--window {args.window}: must be at least 1, and pairs aren't cut")
    if len(columns) == 2 and is_fasta(args.input):
        raise InputError(
            f"{args.input}: is FASTA, and {args.model} was trained on pairs; give a CSV file with both sequences"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    names = choose_alone(tuned.config, device, dtype, args.max_length or MAX_SEQUENCE, args.kernels)
    tuned.model.to(device)
    settings = Settings(dtype=args.dtype, max_length=args.max_length)
    rows = letters = 0
    counts: NDArray[np.int64] = np.zeros(tuned.objective.classes, dtype=np.int64)
    with replacing(args.out) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header(tuned))
        for inputs in _chunks(_inputs(args.input, columns, args.window, tuned)):
            letters += sum(has_other_letters(item.first.text) for item in inputs)
            outputs = outputs_of(
                tuned.model, _tokens(args.input, inputs, tuned, settings), tuned.objective, settings, device
            )
            if not np.isfinite(outputs).all():
                raise RuntimeError(f"{args.model}: gives a value that is not a number for a sequence of {args.input}")
            for item, values in zip(inputs, outputs, strict=True):
                writer.writerow([item.first.name, *row_of(values)])
            rows += len(inputs)
            counts += np.bincount(outputs.argmax(-1), minlength=len(counts))
            log(f"{rows:,} sequences")
        text.detach()  # so that it doesn't close the stream
    log(f"{args.out}: {rows:,} rows" + (f", by class {', '.join(map(str, counts.tolist()))}" if len(counts) > 1 else ""))
    if letters:
        log(f"{args.input}: {letters:,} sequences have letters other than A, C, G, T, fed as they are; most become [UNK]")
    classes = counts.tolist() if len(counts) > 1 else None
    return {"out": str(args.out), "rows": rows, "rows_a_class": classes, "task": tuned.about.get("task"), "kernels": names}


def header(tuned: FineTuned) -> list[str]:
    classes = tuned.objective.classes
    if classes == 1:
        return ["name", "value"]
    return ["name", "class", *[f"probability_{number}" for number in range(classes)]]


def row_of(values: NDArray[Any]) -> list[str]:
    """The number; or the class and the probability of each."""
    if len(values) == 1:
        return [f"{values[0]:.9g}"]
    wide = values.astype(np.float64)
    chances = np.exp(wide - wide.max())
    return [str(int(values.argmax())), *[f"{chance:.6f}" for chance in chances / chances.sum()]]


def _inputs(path: Path, columns: Sequence[str], window: int | None, tuned: FineTuned) -> Iterator[_Input]:
    encoder = Encoder(tuned.tokenizer, tuned.config.vocab_size)
    if len(columns) == 1:
        limits = {"least": encoder.least_bases, "most": encoder.most_bases}
        for sequence in read_sequences(path, column=columns[0], window=window, **limits):
            yield _Input(sequence, None)
        return
    for first, second in zip(*(read_sequences(path, column=column) for column in columns), strict=True):
        yield _Input(first, second)


def _chunks(inputs: Iterable[_Input]) -> Iterator[list[_Input]]:
    source = iter(inputs)
    while chunk := list(islice(source, AT_ONCE)):
        yield chunk


def _tokens(path: Path, inputs: Sequence[_Input], tuned: FineTuned, settings: Settings) -> Any:
    """As in fine-tuning; a message names the record instead of a line."""
    seconds = None if inputs[0].second is None else [item.second.text for item in inputs if item.second is not None]
    texts = [item.first.text for item in inputs]
    nothing = np.zeros(len(inputs), dtype=np.int64)
    rows = Rows(path, texts, nothing, np.arange(len(inputs)), "", seconds, [item.first.where for item in inputs])
    return tokenize(rows, tuned.tokenizer, tuned.config.vocab_size, settings.max_length)
