"""Makes tokenizers: a BPE trained on a sample of the genomes, or k-mers, which need no training.

Training a BPE takes about 50 bytes of RAM a base, because to BPE a whole window is one "word". The sample (sample.py)
therefore has a budget in bases. The file has the ids of the published DNABERT-2 tokenizer, A C G T = 5 to 8, then merges, as
"A C" strings, which every version of the library reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_prep.cli import InputError, add_verb, log, write_atomically
from data_prep.dataset import SPECIALS
from data_prep.inputs.genomes import Genome, find_genomes, read_regions
from data_prep.tokenizing import compare as comparison
from data_prep.tokenizing.kmer_tokenizer import KINDS, K, kmer_json
from data_prep.tokenizing.memory import available_memory, peak_memory
from data_prep.tokenizing.sample import Sample
from data_prep.tokenizing.tokenizer_file import tokenizer_json

WINDOW_BASES = 1_000
MINIMUM_WINDOW_BASES = 100  # the last window of a record may be shorter than the others, down to this
SAMPLE_BASES = 50_000_000
VOCAB_SIZE = 4096
MAX_TOKEN_BASES = 32  # the published tokenizer's longest; near-duplicate genomes would yield tokens of hundreds of bases
RAM_BYTES_A_BASE = 50  # measured on genomes
RAM_BYTES_AT_REST = 100_000_000  # of a process that has loaded all this and reads genomes
_ACGT = re.compile("[ACGT]+")


def register(verbs: Any) -> None:
    """Add `tokenizer` to the command line."""
    verb = add_verb(verbs, "tokenizer", run_tokenizer, "Make a tokenizer, or compare several on the same genomes.")
    verb.add_argument(
        "--genomes",
        type=Path,
        metavar="DIR",
        help="folder of FASTA files: DIR/<category>/<species>.fa[.gz]; k-mers need none",
    )
    verb.add_argument(
        "--out", type=Path, metavar="FILE", help="the tokenizer.json to write; with --compare a folder for table and plot"
    )
    verb.add_argument("--kind", choices=["bpe", *KINDS], help="kind of tokenizer (default: bpe)")
    verb.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="compare tokenizer files; a k-mer tokenizer may be named instead, as in kmer:6 or overlapping-kmer:3",
    )
    numbers = {
        "--vocab-size": f"bpe: tokens, with the 5 special ones (default: {VOCAB_SIZE})",
        "--k": f"k-mers: letters of one (default: {K})",
        "--sample-bases": "bpe, --compare: budget of the sample in bases; training takes about "
        f"{RAM_BYTES_A_BASE} bytes of RAM a base (default: {SAMPLE_BASES}, to compare {comparison.SAMPLE_BASES})",
        "--seed": "bpe, --compare: chooses the sample (default: 0)",
        "--sequence-length": "--compare: tokens of a sequence, with [CLS] and [SEP] "
        f"(default: {comparison.SEQUENCE_LENGTH})",
    }
    for flag, text in numbers.items():
        verb.add_argument(flag, type=int, metavar="N", help=text)


# What each way of using the verb takes beside the options of all.
_TAKES = {
    "--compare": ("genomes", "sample_bases", "seed", "sequence_length"),
    "--kind bpe": ("genomes", "vocab_size", "sample_bases", "seed"),
    **{f"--kind {kind}": ("genomes", "k") for kind in KINDS},  # genomes: read by none, but scripts give them to all
}


def run_tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    """Make a tokenizer, or compare some."""
    started = time.monotonic()
    if args.compare and args.kind:
        raise InputError("--kind and --compare: give one of them; a tokenizer is made first, then compared")
    way = "--compare" if args.compare else f"--kind {args.kind or 'bpe'}"
    options = ("genomes", "vocab_size", "k", "sample_bases", "seed", "sequence_length")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    for name in given:
        if name not in _TAKES[way]:
            raise InputError(f"--{name.replace('_', '-')}: is not for {way}; leave it out")
    if not args.compare and args.out is None:
        raise InputError("--out: is missing; name the tokenizer.json to write")
    if args.kind in KINDS:
        if args.genomes is not None:
            log(f"--genomes {args.genomes}: not read; {args.kind} needs no sample")
        data = kmer_json(args.kind, given.get("k", K))
        write_atomically(args.out, data)
        result = {"vocab_size": len(json.loads(data)["model"]["vocab"]), "sha256": hashlib.sha256(data).hexdigest()}
        log(f"{args.out}: {result['vocab_size']} tokens, {args.kind}, k {given.get('k', K)}")
    elif args.genomes is None:
        raise InputError("--genomes: is missing; name the folder of FASTA files to take the sample from")
    elif args.compare:
        result = comparison.compare(args.compare, out=args.out, **given)
    else:
        result = train(out=args.out, **given)
        seconds = time.monotonic() - started
        log(f"{args.out}: {result['vocab_size']} tokens from {result['sample_bases']:,} bases in {seconds:.1f} s")
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def train(
    genomes: Path, out: Path, *, vocab_size: int = VOCAB_SIZE, sample_bases: int = SAMPLE_BASES, seed: int = 0
) -> dict[str, Any]:
    """Train a BPE on the FASTA files below `genomes` and write it to `out`; return counts, and RAM in bytes."""
    smallest = len(SPECIALS) + len("ACGT")
    if not smallest <= vocab_size <= 1 << 16:
        raise InputError(f"--vocab-size {vocab_size}: must be from {smallest} to 65536")
    found = find_genomes(genomes)
    log(f"counting {WINDOW_BASES}-base windows of A, C, G, T in {len(found)} files")
    sample = Sample(found, clean_windows, sample_bases, seed)
    bases = sum(sample.bases)
    if not bases:
        raise InputError(
            f"{genomes}: no window of A, C, G, T to train on ({WINDOW_BASES} bases without another letter, or what a "
            f"shorter record has), or --sample-bases {sample_bases} is less than one has"
        )
    predicted = RAM_BYTES_AT_REST + bases * RAM_BYTES_A_BASE
    log(f"training on {bases:,} bases; this takes about {predicted / 1e9:.2f} GB of RAM")
    available = available_memory()
    if available is not None and predicted > available:
        fitting = max(0, available - RAM_BYTES_AT_REST) // RAM_BYTES_A_BASE
        log(
            f"warning: only {available / 1e9:.2f} GB of RAM are available, so that this process may be killed; "
            f"--sample-bases {fitting} would fit"
        )
    tokenizer = train_bpe(sample, vocab_size)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        log(f"the sample yields only {size} tokens, not {vocab_size}: every pair of tokens has been merged")
    data = _published_layout(tokenizer)
    write_atomically(out, data)
    peak = peak_memory()
    log(f"peak RAM of this process: {peak / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB")
    return {
        "vocab_size": size,
        "sample_bases": bases,
        "sample_windows": {genome.name: count for genome, count in zip(found, sample.windows, strict=True)},
        "sha256": hashlib.sha256(data).hexdigest(),
        "ram_bytes_predicted": predicted,
        "ram_bytes_peak": peak,
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
    """Windows that have no letter but A, C, G, T, at multiples of 1,000 bases in each record, in file order."""
    for region in read_regions(genome.path):  # a region's size is a multiple of a window's
        text = region.bases
        for start in range(0, len(text), WINDOW_BASES):
            window = text[start : start + WINDOW_BASES]
            # A short rest of a long record is not worth a place; a short record is, such as a row of a table.
            worth = len(window) >= MINIMUM_WINDOW_BASES or region.start + start == 0
            if worth and b"N" not in window:
                yield window.decode("ascii")


def _published_layout(tokenizer: Tokenizer) -> bytes:
    """The trained tokenizer as bytes, key by key as in the published file."""
    trained = json.loads(tokenizer.to_str())["model"]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "[UNK]",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "vocab": dict(sorted(trained["vocab"].items(), key=lambda entry: entry[1])),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in trained["merges"]],
    }
    return tokenizer_json({"type": "Whitespace"}, model)
