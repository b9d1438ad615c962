"""Final models and counting models on the validation data, in bits a base with standard errors: finals.csv.

    python benchmarks/learning-curves/finals.py RUN_DIR... --out benchmarks/learning-curves

Of each run: its last checkpoint on the masks of its validation, by sequence, and, the first time a dataset comes, of
the same sequences,
* `token frequencies`: the hidden tokens by how often each stands in the train split, over the same hidden bases; not for
  overlapping k-mers, which show most of a hidden token;
* `order k`: every base given the k bases before it (left context only), by counts of the train split;
* `k on each side`: every base given the k bases before and the k after it.

A context's counts c are smoothed towards the next shorter one's p: (c + 128 p) / (sum of c + 128). At the ends of a
sequence the longest context that is whole is taken. Standard errors are those of a ratio of sums over sequences, taken as
independent.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from data_prep.codec import Codec
from pretrain.bits import hidden_bases
from pretrain.config import load_config
from pretrain.loader import Loader, MaskedBatch, open_dataset
from pretrain.model import MaskedLanguageModel
from pretrain.pretrained import load_pretrained

SMOOTHING = 128.0  # best of 8, 32, 128 and 512 for order 11, on the validation split of 6-mers
BORDER = 4  # between sequences; bases are 0 to 3
LEFT = [(k, 0) for k in range(12)]
BOTH = [(k, k) for k in range(6)]
REPORTED = {"order 0": LEFT[:1], "order 5": LEFT[:6], "order 11": LEFT, "5 on each side": BOTH}
BASES = np.full(256, BORDER, np.uint8)
BASES[list(b"ACGT")] = range(4)


def ratio(bits_b: NDArray[np.float64], bases_b: NDArray[np.float64]) -> tuple[float, float]:
    """Sum of bits / sum of bases, and its standard error (delta method). Both [sequences]."""
    mean, n = bits_b.sum() / bases_b.sum(), len(bits_b)
    return mean, math.sqrt(n / (n - 1) * ((bits_b - mean * bases_b) ** 2).sum()) / bases_b.sum()


def model_bits(run_dir: Path, batches: Sequence[MaskedBatch], codec: Codec) -> tuple[NDArray[np.float64], ...]:
    """(bits, hidden bases), both [sequences], of the run's last checkpoint."""
    pretrained = load_pretrained(run_dir)
    model = MaskedLanguageModel(pretrained.config).eval()
    model.load_state_dict(pretrained.weights, strict=False)  # the tied matrix stands there once
    bits, bases = [], []
    with torch.no_grad():
        for batch in batches:
            loss_m = F.cross_entropy(model.logits(batch.packed, batch.index_m), batch.labels_m, reduction="none").numpy()
            bits.append(by_sequence(batch, np.where(hidden_bases(batch, codec) > 0, loss_m / math.log(2), 0)))
            bases.append(by_sequence(batch, hidden_bases(batch, codec)))
    return np.concatenate(bits), np.concatenate(bases)


def by_sequence(batch: MaskedBatch, values_m: NDArray[np.generic]) -> NDArray[np.float64]:
    """Sums over the predicted tokens of each sequence."""
    ends = batch.packed.cu_seqlens.numpy()
    return np.bincount(np.searchsorted(ends, batch.index_m.numpy(), side="right") - 1, values_m, len(ends) - 1)


def frequency_bits(
    counts_v: NDArray[np.int64], batches: Sequence[MaskedBatch], codec: Codec
) -> tuple[NDArray[np.float64], ...]:
    """(bits, hidden bases), both [sequences], of tokens by their counts in the train split, plus one each."""
    bits_v = -np.log2((counts_v + 1) / (counts_v + 1).sum())
    bits, bases = [], []
    for batch in batches:
        bases_m = hidden_bases(batch, codec)
        bits.append(by_sequence(batch, np.where(bases_m > 0, bits_v[batch.labels_m.numpy()], 0)))
        bases.append(by_sequence(batch, bases_m))
    return np.concatenate(bits), np.concatenate(bases)


def train_tokens(loader: Loader) -> Iterator[NDArray[np.uint16]]:
    """Content tokens of every sequence of the train split."""
    for row, count in enumerate(loader.train_pool.split.shards["sequences"].astype(int)):
        for start in range(0, count, 1024):
            numbers = np.arange(start, min(start + 1024, count))
            tokens_bt, lengths_b = loader.train_pool.read(np.full_like(numbers, row), numbers)
            yield from (tokens_t[:length] for tokens_t, length in zip(tokens_bt, lengths_b, strict=True))


def valid_tokens(batches: Sequence[MaskedBatch]) -> Iterator[NDArray[np.uint16]]:
    """Content tokens of every validation sequence, without masks, in the order of the batches."""
    for batch in batches:
        ids_t = batch.packed.ids_t.numpy().copy()
        ids_t[batch.index_m.numpy()] = batch.labels_m.numpy()
        for start, end in batch.packed.cu_seqlens.unfold(0, 2, 1).tolist():
            yield ids_t[start + 1 : end - 1].astype(np.uint16)


def text(sequences: Sequence[NDArray[np.uint16]], codec: Codec) -> NDArray[np.uint8]:
    """The bases of all sequences, with a BORDER after each: uint8 [n]."""
    return BASES[np.frombuffer(b"".join(codec.decode(tokens) + b"N" for tokens in sequences), np.uint8)]


def contexts(bases_n: NDArray[np.uint8], left: int, right: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places that have a whole context, its number at each): int64 [places] both."""
    number_n, whole_n = np.zeros(len(bases_n), np.int64), bases_n != BORDER
    for shift in [*range(1, left + 1), *range(-right, 0)]:
        there_n = np.roll(bases_n, shift)  # the last of all is a border, so none is seen across the ends
        whole_n &= there_n != BORDER
        number_n = number_n * 4 + there_n
    places = np.flatnonzero(whole_n)
    return places, number_n[places]


def counting_bits(
    train_n: NDArray[np.uint8], valid_n: NDArray[np.uint8], sizes: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """-log2 p of each base of the validation text by counts of contexts of growing `sizes` (left, right): [n]."""
    p_n = np.full(len(valid_n), 0.25)
    for left, right in sizes:
        places, number = contexts(train_n, left, right)
        counts_c4 = np.bincount(number * 4 + train_n[places], minlength=4 ** (left + right + 1)).reshape(-1, 4)
        places, number = contexts(valid_n, left, right)
        there = counts_c4[number]
        seen = there[np.arange(len(places)), valid_n[places]]
        p_n[places] = (seen + SMOOTHING * p_n[places]) / (there.sum(1) + SMOOTHING)
    return -np.log2(p_n)


def rows_of(run_dir: Path, done: set[str]) -> Iterator[tuple[str, str, float, float, int, int]]:
    """(run, model, bits a base, standard error, sequences, bases) of a run's model and of what it is compared with.

    `done`: sums of the datasets whose texts have been counted; this one's is added.
    """
    config, dataset = open_dataset(load_config(str(run_dir / "config.yaml")))
    codec, loader = Codec(dataset.tokenizer_path), Loader(config, dataset, rank=0, ranks=1, plain=True)
    batches = [batch for _, batch in loader.validation()]
    bits_b, bases_b = model_bits(run_dir, batches, codec)
    yield run_dir.name, "model", *ratio(bits_b, bases_b), len(bits_b), int(bases_b.sum())
    train = list(train_tokens(loader))
    if codec.overlap == 0:
        counts_v = np.bincount(np.concatenate(train), minlength=codec.vocab_size)
        plain_b, _ = frequency_bits(counts_v, batches, codec)
        yield run_dir.name, "token frequencies", *ratio(plain_b, bases_b), len(bits_b), int(bases_b.sum())
        yield run_dir.name, "gain over token frequencies", *ratio(plain_b - bits_b, bases_b), len(bits_b), int(bases_b.sum())
    if dataset.sha256 in done:
        return
    done.add(dataset.sha256)
    train_n, valid_n = text(train, codec), text(list(valid_tokens(batches)), codec)
    sequence_n, inside_n = np.cumsum(valid_n == BORDER), valid_n != BORDER
    for name, sizes in REPORTED.items():
        bits_n = counting_bits(train_n, valid_n, sizes)
        bits_b, bases_b = (
            np.bincount(sequence_n[inside_n], bits_n[inside_n]),
            np.bincount(sequence_n[inside_n]).astype(float),
        )
        yield run_dir.name, name, *ratio(bits_b, bases_b), len(bits_b), int(bases_b.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR")
    args = parser.parse_args()
    with (args.out / "finals.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "model", "bits_per_base", "standard_error", "sequences", "bases"))
        done: set[str] = set()
        for run_dir in args.run_dirs:
            for run, model, bits, error, sequences, bases in rows_of(run_dir, done):
                writer.writerow((run, model, f"{bits:.5f}", f"{error:.5f}", sequences, bases))


if __name__ == "__main__":
    main()
