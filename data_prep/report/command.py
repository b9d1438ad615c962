"""`python -m data_prep report`: what a dataset was made of and how, for those who will be asked, in tables and plots.

The manifest tells most of it; what tokens and sequences look like is counted in a sample (sample.py).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cli import InputError, add_verb, log, write_atomically
from data_prep.codec import Codec
from data_prep.dataset import Dataset
from data_prep.manifest import check_keys
from data_prep.report import plots as report_plots
from data_prep.report.markdown import REASONS, bases, markdown, percent
from data_prep.report.sample import BLOCKS, Sample, draw
from data_prep.report.tables import Tables


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = add_verb(verbs, "report", run, "Describe a dataset: tables in Markdown, and plots.")
    verb.add_argument("dataset", metavar="DATASET", help="directory or URL of a finished dataset")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets report.md, species.tsv and the plots")
    verb.add_argument(
        "--sample-blocks",
        type=int,
        default=BLOCKS,
        metavar="N",
        help=f"blocks of 1,024 training sequences to count in, at least one a species (default: {BLOCKS})",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb."""
    if args.sample_blocks < 1:
        raise InputError(f"--sample-blocks {args.sample_blocks}: must be at least 1")
    started = time.monotonic()
    result = report(Dataset(args.dataset), args.out, args.sample_blocks)
    seconds = time.monotonic() - started
    log(f"{args.out / 'report.md'}: {result['species']} species, {result['blocks_sampled']} blocks read in {seconds:.1f} s")
    return {**result, "seconds": round(seconds, 3)}


def report(dataset: Dataset, out: Path, sample_blocks: int = BLOCKS) -> dict[str, Any]:
    """Write the report of a finished dataset to the folder `out`.

    Returns:
        `out`, `files` (their names), `species`, `blocks_sampled`; of the training data `bases_per_token`, `gc_percent`.

    Raises DamagedBlock naming a block that is not what was written, InputError for a dataset of an earlier version.
    """
    check_keys(dataset.storage.describe("manifest.json"), dataset.manifest)
    codec = Codec(dataset.tokenizer_path)
    sample = draw(dataset, codec, limit=sample_blocks)
    tables = Tables(dataset.manifest["species"], sample)
    files = render(dataset, codec, sample, tables)
    for name, data in files.items():
        write_atomically(out / name, data)
    return {
        "out": str(out),
        "files": sorted(files),
        "blocks_sampled": sample.blocks,
        **{key: tables.total[key] for key in ("species", "bases_per_token", "gc_percent")},
    }


def render(dataset: Dataset, codec: Codec, sample: Sample, tables: Tables) -> dict[str, bytes]:
    """The report's files by their names."""
    text = markdown(dataset, codec, sample, tables)
    return {"report.md": text.encode(), "species.tsv": tables.tsv().encode(), **_plots(codec, sample, tables)}


def _plots(codec: Codec, sample: Sample, tables: Tables) -> dict[str, bytes]:
    """The PNGs by their names."""
    groups = {name: tables.of(numbers) for name, numbers in tables.groups.items()}
    group_of = {number: name for name, numbers in tables.groups.items() for number in numbers}
    shares = np.array([[100 * sums[key] / max(1, sums["bases_in"]) for key in REASONS] for sums in groups.values()])
    left_out = [
        f"{percent(sum(sums[key] for key in REASONS), sums['bases_in'])} of {bases(sums['bases_in'])}"
        for sums in groups.values()
    ]
    largest, rest = tables.order[: report_plots.BARS], tables.order[report_plots.BARS :]
    others = f"{len(rest):,} more have {tables.of(rest)['train_percent']:.2f} % together" if rest else ""
    with_data = [name for name, sums in groups.items() if sums["gc_percent"] is not None]
    return {
        "tokens.png": report_plots.tokens(codec.token_bases, sample.token_uses, sample.length_counts, codec.overlap),
        "gc.png": report_plots.gc(
            with_data,
            np.array([sample.gc_sequences[tables.groups[name]].sum(axis=0) for name in with_data]),
            [groups[name]["gc_percent"] for name in with_data],
            list(groups),
        ),
        "dropped.png": report_plots.dropped(list(groups), list(REASONS.values()), shares, left_out),
        "species.png": report_plots.species(
            [tables.species[number]["name"] for number in largest],
            [group_of[number] for number in largest],
            list(groups),
            [tables.of([number])["train_percent"] for number in largest],
            others,
        ),
    }
