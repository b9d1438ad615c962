"""Makes up genomes and a fine-tuning task, the data that the demo and tests run on when no real ones are given.

    OUT/genomes/<category>/<species>.fa          OUT/gue/synthetic/motif/{train,dev,test}.csv

A language model must have something to learn here, and what it learns must help the task. So each genome is an
order-5 Markov chain of its own, with the same mutated elements ("genes") again and again, and with pairs of motifs:
two noisy copies of words of one family, 20 to 40 bases apart. The task is to tell 100-base sequences with such a pair
(label 1) from ones in which the words' letters are shuffled (label 0): composition is equal, the motif decides.

The genomes have what real ones have: several contigs, soft-masked (lower case) elements, runs of N, gzip. Equal
arguments give equal bytes. Everything is drawn in parallel by numpy; 4 Mb take about a second.
"""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, write_atomically

BASES = 4_000_000
SPECIES = 6
CATEGORIES = ("bacteria", "fungi", "invertebrate", "mammalian", "plant", "protozoa", "vertebrate_other", "virus")
ORDER = 5  # of the Markov chains
CHAIN_BASES = 500  # chains run side by side and are then laid end to end
CONTIGS = 4  # per species
MOTIF_BASES, MOTIFS = 12, 4  # letters of a motif, words in the family
MOTIF_NOISE = 0.08  # chance that a letter of a copy is replaced
GAP_BASES = (20, 40)  # between the starts of the two motifs of a pair
ELEMENT_BASES, ELEMENTS = 300, 12  # a species' repeated elements
ELEMENT_NOISE = 0.05
TASK_BASES = 100
TASK_ROWS = {"train": 2000, "dev": 400, "test": 400}
LETTERS = np.frombuffer(b"ACGT", dtype=np.uint8)

Codes = NDArray[np.uint8]  # bases as 0 to 3


def synthesize(out: Path, *, bases: int = BASES, species: int = SPECIES, seed: int = 0) -> dict[str, Any]:
    """Write genomes of `bases` bases in all and the task below `out`; return counts."""
    smallest = 4 * CONTIGS * ELEMENT_BASES
    if species < 1 or bases < species * smallest:
        raise InputError(f"--bases {bases} --species {species}: at least 1 species of {smallest} bases is needed")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another --out")
    motifs = np.random.default_rng([seed, 0]).integers(0, 4, (MOTIFS, MOTIF_BASES), dtype=np.uint8)
    chances = [_chain_chances(np.random.default_rng([seed, 1, number])) for number in range(species)]
    digits = len(str(species - 1))
    for number in range(species):
        rng = np.random.default_rng([seed, 2, number])
        size = bases // species + (bases % species if number == 0 else 0)
        text = _genome(rng, f"synthetic_{number:0{digits}d}", size, chances[number], motifs)
        path = out / "genomes" / CATEGORIES[number % len(CATEGORIES)] / f"synthetic_{number:0{digits}d}.fa"
        if number == species - 1:  # one of them compressed, as downloads are
            write_atomically(path.with_name(path.name + ".gz"), gzip.compress(text, mtime=0))
        else:
            write_atomically(path, text)
    task = out / "gue" / "synthetic" / "motif"
    for number, (split, rows) in enumerate(TASK_ROWS.items()):
        write_atomically(task / f"{split}.csv", _task(np.random.default_rng([seed, 3, number]), rows, chances, motifs))
    return {"bases": bases, "species": species, "task": str(task), "task_rows": TASK_ROWS}


def _chain_chances(rng: np.random.Generator) -> NDArray[np.float64]:
    """Cumulative chances of A, C, G [contexts, 3] of a species' chain; far from uniform, so there is much to learn."""
    chances = rng.dirichlet(np.full(4, 0.6), 4**ORDER)
    # A chain with only rare letters would fall into a cycle; 10 % of uniform chance keeps it going.
    return np.cumsum(0.9 * chances + 0.1 / 4, axis=1)[:, :3]


def _chains(rng: np.random.Generator, chances: NDArray[np.float64], number: int, size: int) -> Codes:
    """`number` independent chains of `size` bases [number, size]."""
    context: NDArray[np.int64] = rng.integers(0, 4**ORDER, number)
    codes: Codes = np.empty((size, number), dtype=np.uint8)
    for step in range(size):
        codes[step] = (rng.random(number)[:, None] > chances[context]).sum(axis=1)
        context = (context * 4 + codes[step]) % 4**ORDER
    chains: Codes = codes.T
    return chains


def _noisy(rng: np.random.Generator, codes: Codes, noise: float) -> Codes:
    """A copy in which each base is replaced by a random one with chance `noise`."""
    random = rng.integers(0, 4, codes.shape, dtype=np.uint8)
    noisy: Codes = np.where(rng.random(codes.shape) < noise, random, codes)
    return noisy


def _motif_pairs(rng: np.random.Generator, motifs: Codes, number: int) -> tuple[Codes, NDArray[np.int64]]:
    """Noisy words of `number` pairs [number, 2, MOTIF_BASES] and the distances of their starts [number]."""
    words = motifs[rng.integers(0, len(motifs), (number, 2))]
    return _noisy(rng, words, MOTIF_NOISE), rng.integers(*GAP_BASES, number, endpoint=True)


def _genome(rng: np.random.Generator, name: str, size: int, chances: NDArray[np.float64], motifs: Codes) -> bytes:
    """A species' FASTA file."""
    codes = _chains(rng, chances, -(-size // CHAIN_BASES), CHAIN_BASES).reshape(-1)[:size]
    lower = np.zeros(size, dtype=np.bool_)
    slots = rng.permutation(size // ELEMENT_BASES - 1)  # 300-base places: a quarter gets elements, another motif pairs
    quarter = len(slots) // 4
    spread = np.arange(ELEMENT_BASES)
    places = slots[:quarter, None] * ELEMENT_BASES + spread
    elements = _chains(rng, chances, ELEMENTS, ELEMENT_BASES)
    codes[places] = _noisy(rng, elements[rng.integers(0, ELEMENTS, quarter)], ELEMENT_NOISE)
    lower[places[: quarter // 2]] = True
    words, gaps = _motif_pairs(rng, motifs, quarter)
    first = slots[quarter : 2 * quarter] * ELEMENT_BASES + rng.integers(0, ELEMENT_BASES - 60, quarter)
    for word, start in enumerate((first, first + gaps)):
        codes[start[:, None] + np.arange(MOTIF_BASES)] = words[:, word]
    letters = LETTERS[codes] + 32 * lower.astype(np.uint8)
    for start in rng.integers(0, size - 500, max(1, size // 200_000)).tolist():
        letters[start : start + int(rng.integers(1, 500))] = ord("N")
    edges = [0, *np.sort(rng.choice(np.arange(1, size // 1000), CONTIGS - 1, replace=False) * 1000).tolist(), size]
    contigs = [letters[start:end].tobytes() for start, end in pairwise(edges)]
    return b"".join(
        f">{name}.{number} made up by data_prep synthesize\n".encode() + _wrapped(contig)
        for number, contig in enumerate(contigs, 1)
    )


def _wrapped(text: bytes, width: int = 80) -> bytes:
    """`text` in lines."""
    return b"".join(text[start : start + width] + b"\n" for start in range(0, len(text), width))


def _task(rng: np.random.Generator, rows: int, chances: list[NDArray[np.float64]], motifs: Codes) -> bytes:
    """One csv of the task: half the rows with a motif pair, half with its letters shuffled."""
    per_species = -(-rows // len(chances))
    codes = np.concatenate([_chains(rng, table, per_species, TASK_BASES) for table in chances])
    codes = codes[rng.permutation(len(codes))[:rows]]
    labels = rng.permutation(np.arange(rows) % 2)
    words, gaps = _motif_pairs(rng, motifs, rows)
    words = np.where(labels[:, None, None] == 1, words, rng.permuted(words, axis=2))
    first = rng.integers(0, TASK_BASES - GAP_BASES[1] - MOTIF_BASES, rows, endpoint=True)
    for word, start in enumerate((first, first + gaps)):
        codes[np.arange(rows)[:, None], start[:, None] + np.arange(MOTIF_BASES)] = words[:, word]
    lines = [f"{LETTERS[row].tobytes().decode()},{label}\n" for row, label in zip(codes, labels.tolist(), strict=True)]
    return ("sequence,label\n" + "".join(lines)).encode()
