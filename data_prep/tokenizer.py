"""Trains the BPE tokenizer on a sample of the genomes that is stratified by species and bounded in memory.

Training takes about 50 bytes of RAM a base, because to BPE a whole window is one "word". The sample therefore has a
budget in bases. Each species gets an equal share of it; what small genomes leave goes to the others. Within a species
the windows with the lowest keyed hash are taken, so the sample depends on the seed and the genomes only, and is
streamed.

The file is laid out like the published DNABERT-2 tokenizer.json, merges as "A C" strings, which every version of the
library reads: no normalizer, Whitespace pre-tokenizer, [UNK] [CLS] [SEP] [PAD] [MASK] = 0 to 4, A C G T = 5 to 8,
merges.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_prep.cli import InputError, log, progress, write_atomically
from data_prep.dataset import SPECIALS
from data_prep.genomes import Genome, find_genomes, read_regions

WINDOW_BASES = 1_000
_ACGT = re.compile("[ACGT]+")
MINIMUM_WINDOW_BASES = 100  # the last window of a contig may be shorter than the others, down to this
SAMPLE_BASES = 50_000_000
VOCAB_SIZE = 4096
MAX_TOKEN_BASES = 32  # the published tokenizer's longest; near-duplicate genomes would yield tokens of hundreds of bases
RAM_BYTES_A_BASE = 50  # measured on genomes


def train(
    genomes: Path, out: Path, *, vocab_size: int = VOCAB_SIZE, sample_bases: int = SAMPLE_BASES, seed: int = 0
) -> dict[str, Any]:
    """Train a BPE on the FASTA files below `genomes` and write it to `out`; return counts."""
    smallest = len(SPECIALS) + len("ACGT")
    if not smallest <= vocab_size <= 1 << 16:
        raise InputError(f"--vocab-size {vocab_size}: must be from {smallest} to 65536")
    found = find_genomes(genomes)
    log(f"counting {WINDOW_BASES}-base windows of A, C, G, T in {len(found)} FASTA files")
    windows = [sum(1 for _ in clean_windows(genome)) for genome in progress(found, total=len(found), unit="files")]
    quotas = fill(windows, sample_bases // WINDOW_BASES)
    most = sum(quotas) * WINDOW_BASES  # the last window of a contig may be shorter
    if not most:
        raise InputError(
            f"{genomes}: no window of A, C, G, T to train on (at least {MINIMUM_WINDOW_BASES} bases without another "
            f"letter), or --sample-bases {sample_bases} is under {WINDOW_BASES}"
        )
    log(f"training on {sum(quotas):,} windows; this takes about {most * RAM_BYTES_A_BASE / 1e9:.2f} GB of RAM")
    sample = _Sample(found, windows, quotas, seed)
    tokenizer = train_bpe(sample, vocab_size)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        log(f"the sample yields only {size} tokens, not {vocab_size}: every pair of tokens has been merged")
    data = _published_layout(tokenizer)
    write_atomically(out, data)
    return {
        "vocab_size": size,
        "sample_bases": sample.bases,
        "sample_windows": {genome.name: quota for genome, quota in zip(found, quotas, strict=True)},
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 0) -> Tokenizer:
    """A BPE of at most `vocab_size` tokens with the ids of the published one: five special tokens, A, C, G, T, merges.

    Trained on the runs of A, C, G, T in `texts`, so that other letters are unknown, as they are to the published one. A pair
    of tokens is merged when it occurs `min_frequency` times.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=list("ACGT"),
        max_token_length=MAX_TOKEN_BASES,
        min_frequency=min_frequency,
        show_progress=False,
    )
    tokenizer.train_from_iterator((run for text in texts for run in _ACGT.findall(text)), trainer=trainer)
    return tokenizer


def clean_windows(genome: Genome) -> Iterator[str]:
    """Windows that have no letter but A, C, G, T, at multiples of 1,000 bases in each contig, in file order."""
    for region in read_regions(genome.path):  # a region's size is a multiple of a window's
        text = region.bases
        for start in range(0, len(text), WINDOW_BASES):
            window = text[start : start + WINDOW_BASES]
            if b"N" not in window and len(window) >= MINIMUM_WINDOW_BASES:
                yield window.decode("ascii")


def fill(available: Sequence[int], budget: int) -> list[int]:
    """Equal shares of `budget` that no one exceeds what it has; what small ones leave is shared by the others."""
    shares, left = [0] * len(available), budget
    for done, index in enumerate(sorted(range(len(available)), key=lambda index: available[index])):
        shares[index] = min(available[index], left // (len(available) - done))
        left -= shares[index]
    return shares


def chosen(species: str, seed: int, available: int, quota: int) -> NDArray[np.bool_]:
    """Which of a species' windows are in the sample [available]: the `quota` of them with the lowest hash."""
    key = hashlib.blake2b(json.dumps([seed, species]).encode(), digest_size=8).digest()
    # SplitMix64 is a bijection of 64-bit numbers, so no two windows have the same hash.
    hashes = np.arange(available, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(key, "<u8")[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    taken = np.zeros(available, dtype=np.bool_)
    taken[np.argpartition(hashes, quota - 1)[:quota] if quota else []] = True
    return taken


class _Sample:
    """The chosen windows, read one at a time; `bases` counts them."""

    def __init__(self, genomes: Sequence[Genome], windows: Sequence[int], quotas: Sequence[int], seed: int) -> None:
        self.genomes, self.windows, self.quotas, self.seed = genomes, windows, quotas, seed
        self.bases = 0

    def __iter__(self) -> Iterator[str]:
        for genome, available, quota in zip(self.genomes, self.windows, self.quotas, strict=True):
            if quota:
                taken = chosen(genome.name, self.seed, available, quota)
                for window, take in zip(clean_windows(genome), taken, strict=True):
                    if take:
                        self.bases += len(window)
                        yield window


def _published_layout(tokenizer: Tokenizer) -> bytes:
    """The trained tokenizer as bytes, key by key as in the published file."""
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in trained["merges"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def special(token: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    single = [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)]
    layout = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "special": True, "content": name, **flags} for id, name in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, sequence("B", 1), special("[SEP]", 1)],
            "special_tokens": {
                token: {"id": token, "ids": [SPECIALS.index(token)], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": dict(sorted(trained["vocab"].items(), key=lambda entry: entry[1])),
            "merges": merges,
        },
    }
    return json.dumps(layout, indent=2, ensure_ascii=False).encode()
