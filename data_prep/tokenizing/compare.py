"""Compares tokenizers on one sample of the same genomes: what a base costs to train on, and how the vocabulary is used.

This is the argument of DNABERT-2 for BPE: fewer tokens a base are fewer sequences, and so fewer operations, for the same
genomes. Sequences are made by the packer itself, so that numbers are those of datasets. How well a model learns is another
question, which only training answers.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cli import InputError, log, progress, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import SPECIALS
from data_prep.inputs.genomes import Genome, find_genomes, read_regions
from data_prep.pack import MINIMUM_TOKENS, Packed, Packer
from data_prep.tokenizing.kmer_tokenizer import KINDS, kmer_json
from data_prep.tokenizing.sample import Sample

TABLE, PLOT = "tokenizers.md", "tokenizers.png"  # in the folder of the results
SAMPLE_BASES = 10_000_000
SEQUENCE_LENGTH = 128
WINDOW_BASES = 100_000  # of the sample: long, because each ends with a short sequence
# The DNABERT-2 model of 117 million parameters, and the share of its tokens that are masked.
HIDDEN, INTERMEDIATE, LAYERS, MASKED = 768, 3072, 12, 0.15
_NAMED = re.compile(rf"({'|'.join(KINDS)}):(\d+)")
COLUMNS = {  # of the table: heading, and how to print a number
    "name": ("tokenizer", "{}"),
    "vocab_size": ("vocabulary", "{:,}"),
    "bases_per_token": ("bases/token", "{:.2f}"),
    "tokens_per_base": ("tokens/base", "{:.4f}"),
    "bases_per_sequence": ("bases/sequence", "{:.0f}"),
    "sequences_per_megabase": ("sequences/Mb", "{:,.0f}"),
    "gflops_per_base": ("GFLOP/base", "{:.4f}"),
    "relative_flops": ("relative", "{:.2f}"),
    "vocabulary_used": ("used", "{:.1%}"),
    "effective_vocabulary": ("effective", "{:,.0f}"),
}


def training_flops(vocab_size: int, tokens: int, squared_lengths: int, masked: float) -> float:
    """Matrix FLOPs of training the 117M model, with a vocabulary of this size, once on these tokens.

    In a layer a token costs 4 d^2 (q, k, v, output) + 3 d f (GEGLU) multiply-adds, and a sequence of n tokens 2 n^2 d more
    (attention); a masked token costs d^2 + d v in the head, and in the last layer the others save d^2 + 3 d f, as `pretrain`
    does. A multiply-add is 2 FLOPs, and the backward pass takes twice the forward pass (Kaplan et al. 2020, "Scaling laws
    for neural language models", section 2.1; Chowdhery et al. 2022, "PaLM", appendix B). At 128 tokens and v = 4096 this is
    0.658 GFLOP a token; with the whole last layer it would be 0.697.

    Args:
        vocab_size: v.
        tokens: with [CLS] and [SEP].
        squared_lengths: the sum over sequences of the square of their tokens.
        masked: tokens whose logits are computed.
    """
    layer = tokens * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE) + 2 * squared_lengths * HIDDEN
    not_needed = (tokens - masked) * (HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    return 6 * (LAYERS * layer - not_needed + masked * (HIDDEN**2 + HIDDEN * vocab_size))


class Count:
    """What one tokenizer makes of the sample: a packer and its sums."""

    def __init__(self, name: str, codec: Codec, sequence_length: int) -> None:
        self.name, self.codec = name, codec
        self.packer = Packer(codec, sequence_length)
        self.bases = self.sequences = self.squared_lengths = 0
        self.uses = np.zeros(codec.vocab_size, dtype=np.int64)  # of each token

    def add(self, packed: Packed) -> None:
        """Count the sequences of one piece."""
        self.bases += int(packed.bases.sum())
        self.sequences += len(packed.lengths)
        self.squared_lengths += int(((packed.lengths + 2) ** 2).sum())
        self.uses += np.bincount(packed.tokens, minlength=self.codec.vocab_size)

    def row(self) -> dict[str, Any]:
        """The numbers. A sequence may cover more bases than its tokens move on by, if k-mers overlap."""
        content, size = int(self.uses.sum()), self.codec.vocab_size
        flops = training_flops(size, content + 2 * self.sequences, self.squared_lengths, MASKED * content)
        share = self.uses[self.uses > 0] / content
        return {
            "name": self.name,
            "kind": self.codec.kind,
            "k": self.codec.k,
            "sha256": self.codec.sha256,
            "vocab_size": size,
            "bases": self.bases,
            "tokens": content,
            "sequences": self.sequences,
            "bases_per_token": self.bases / content,
            "tokens_per_base": content / self.bases,
            "bases_per_sequence": self.bases / self.sequences,
            "sequences_per_megabase": 1e6 * self.sequences / self.bases,
            "gflops_per_base": flops / 1e9 / self.bases,
            "vocabulary_used": len(share) / (size - len(SPECIALS)),
            "effective_vocabulary": float(np.exp(-(share * np.log(share)).sum())),
        }


def compare(
    tokenizers: Sequence[str],
    genomes: Path,
    *,
    out: Path | None = None,
    sample_bases: int = SAMPLE_BASES,
    seed: int = 0,
    sequence_length: int = SEQUENCE_LENGTH,
) -> dict[str, Any]:
    """Compare tokenizers on a sample of `genomes`; write table and plot to the folder `out` if there is one.

    Args:
        tokenizers: files, or names such as `kmer:6`; costs are told relative to the first.
        sample_bases: budget.

    Returns:
        `sample_bases`, and `tokenizers`, a dict each, in the order given.
    """
    if sequence_length < MINIMUM_TOKENS + 2:
        raise InputError(f"--sequence-length {sequence_length}: must be at least {MINIMUM_TOKENS + 2}")
    if out is not None and not out.is_dir():
        if out.exists():
            raise InputError(f"--out {out}: is a file; with --compare name a folder")
        if out.suffix.lower() in (".json", ".md", ".png"):
            raise InputError(
                f"--out {out}: is the name of a file; with --compare name a folder, such as {out.with_suffix('')}, "
                f"which gets {TABLE} and {PLOT}"
            )
    codecs = [open_codec(name) for name in tokenizers]
    counts = [Count(*pair, sequence_length) for pair in zip(_labels(tokenizers), codecs, strict=True)]
    found = find_genomes(genomes)
    log(f"counting {WINDOW_BASES}-base windows in {len(found)} files")
    sample = Sample(found, _windows, sample_bases, seed)
    bases = sum(sample.bases)
    for number, window in enumerate(progress(sample, total=sum(sample.windows), unit="windows")):
        for count in counts:
            count.packer.add(count.add, number, 0, window)
    for count in counts:
        count.packer.flush()
        if not count.sequences:
            raise InputError(
                f"{genomes}: no sequence for {count.name} in a sample of {bases:,} bases; give genomes with A, C, G, T, "
                f"and --sample-bases of at least {WINDOW_BASES:,}"
            )
    rows = [count.row() for count in counts]
    for row in rows:
        row["relative_flops"] = row["gflops_per_base"] / rows[0]["gflops_per_base"]
    text = table(rows)
    log(text)
    if out is not None:
        about = (
            f"{bases:,} bases sampled from {len(found)} files (seed {seed}), in sequences of {sequence_length} tokens. "
            "GFLOP/base: matrix products of training the DNABERT-2 model (117M at 4,096 tokens) once on each base, "
            f"{MASKED:.0%} of the tokens masked; relative to {rows[0]['name']}. used: share of the vocabulary that occurs; "
            "effective: how many tokens, all equally frequent, would vary as much (exp of the entropy)."
        )
        write_atomically(out / TABLE, f"{text}\n\n{about}\n".encode())
        write_atomically(out / PLOT, plot(rows))
    return {"sample_bases": bases, "sequence_length": sequence_length, "tokenizers": rows}


def _windows(genome: Genome) -> Iterator[bytes]:
    return (region.bases for region in read_regions(genome.path, WINDOW_BASES))


def open_codec(name: str) -> Codec:
    """The tokenizer of a file, or of a name such as `overlapping-kmer:6`."""
    named = _NAMED.fullmatch(name)
    if named is None:
        if not Path(name).exists():
            raise InputError(f"{name}: no such file; name a tokenizer.json, or k-mers like kmer:6 or overlapping-kmer:3")
        return Codec(Path(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(kmer_json(named[1], int(named[2])))
        return Codec(path)


def _labels(tokenizers: Sequence[str]) -> list[str]:
    """What to call them: a file's name without suffix, after as many of its folders as tell it from the others."""
    parts = [(name,) if _NAMED.fullmatch(name) else Path(name).with_suffix("").parts for name in tokenizers]
    labels = [each[-1] for each in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        times = Counter(labels)
        labels = [label if times[label] == 1 else "/".join(each[-depth:]) for label, each in zip(labels, parts, strict=True)]
    return labels


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown, a line a tokenizer, wide enough to be read as it is."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    lines += [[form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    padded.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """A PNG with a bar a tokenizer, once for each of the numbers that decide."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: it looks for a display and keeps figures

    panels = {
        "bases_per_token": ("Bases a token", "{:.2f}"),
        "sequences_per_megabase": ("Sequences a megabase", "{:,.0f}"),
        "relative_flops": (f"Training FLOPs a base\nrelative to {rows[0]['name']}", "{:.2f}"),
        "effective_vocabulary": ("Effective vocabulary\n(pale: tokens there are)", "{:,.0f}"),
    }
    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(13, 1.3 + 0.42 * len(rows)), dpi=110, layout="constrained")
        for axes, (key, (title, form)) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            values, places = [row[key] for row in rows], range(len(rows))
            ends, labels, room = list(values), [form.format(value) for value in values], 1.25
            if key == "effective_vocabulary":
                ends = [row["vocab_size"] for row in rows]
                labels = [f"{label} of {end:,}" for label, end in zip(labels, ends, strict=True)]
                room = 1.75
                axes.barh(places, ends, color="#cfdfec")
            axes.barh(places, values, color="#3f7fb5")
            for place, end, label in zip(places, ends, labels, strict=True):  # behind the longer bar, across no edge
                axes.annotate(label, (end, place), xytext=(4, 0), textcoords="offset points", va="center")
            axes.set_xlim(0, room * max(ends))
            axes.set_yticks(places, [row["name"] for row in rows])
            axes.set_title(title)
        axes.invert_yaxis()  # shared by all
        image = io.BytesIO()
        figure.savefig(image, format="png")
        return image.getvalue()
