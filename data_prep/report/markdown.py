"""The text of a dataset's report. It stays readable with thousands of species: the largest are named, the rest added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.codec import Codec
from data_prep.dataset import Dataset
from data_prep.report.sample import Sample
from data_prep.report.tables import Tables

ROWS = 40  # of a table
NAMES = 30  # in a sentence
REASONS = {  # of dropped bases, as in the manifest -> as a reader is told
    "not_acgt": "not A, C, G, T",
    "short_tail": "short tail",
    "truncated": "truncated",
    "duplicate": "duplicate",
    "near_duplicate": "near-duplicate",
    "excluded": "excluded",
}
SETTINGS = {  # keys of the manifest
    "sequence_length": "tokens of a sequence, with [CLS] and [SEP]",
    "minimum_tokens": "tokens of the shortest sequence, without them",
    "packing": "packing",
    "strands": "strands",
    "duplicates_removed": "duplicates removed",
    "valid_fraction": "share for validation asked for",
    "region_bases": "bases of a region, which is all training or all validation (small genomes: less)",
    "unit_bases": "bases of a unit of work",
    "run_bases": "bases tokenized at a time",
    "seed": "seed",
}


def markdown(dataset: Dataset, codec: Codec, sample: Sample, tables: Tables) -> str:
    """The text of report.md."""
    manifest = dataset.manifest
    parts = [
        f"# Dataset `{str(dataset.path).rstrip('/').rpartition('/')[2]}`",
        *_summary(manifest["splits"], sample, tables),
        "## How it was made",
        _settings(dataset),
        "## Categories",
        _species([(f"{_cell(name)}", "", numbers) for name, numbers in tables.categories.items()][:ROWS], tables),
        "## Species",
        _species(tables.largest(ROWS), tables),
        "![Share of the training tokens](species.png)",
        _without_validation(tables),
        "## Bases left out",
        _dropped(tables),
        "![Bases that stand in no sequence](dropped.png)",
        "## Tokens and sequences",
        _tokens(codec, sample),
        "![Lengths of tokens and sequences](tokens.png)",
        "## G + C",
        "![G + C of sequences, by category](gc.png)",
        "## Duplicates",
        *_duplicates(manifest),
        "## Exclusions",
        _exclusions(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(splits: dict[str, Any], sample: Sample, tables: Tables) -> list[str]:
    total, (train, valid) = tables.total, (splits[split] for split in ("train", "valid"))
    share = percent(valid["tokens"], train["tokens"] + valid["tokens"])
    kept = percent(total["bases_kept"], total["bases_in"])
    whole = sample.blocks == sample.blocks_in_all
    read = "all" if whole else f"a sample of {sample.blocks:,} of the {sample.blocks_in_all:,} blocks of"
    return [
        f"{bases(total['bases_in'])} in {total['contigs']:,} contigs of {total['species']:,} species "
        f"({len(tables.categories)} categories); {bases(total['bases_kept'])} ({kept}) stand in sequences.",
        _table(
            ["", "sequences", "tokens", "share of tokens", "shards"],
            [
                [
                    "training",
                    train["sequences"],
                    train["tokens"],
                    percent(train["tokens"], train["tokens"] + valid["tokens"]),
                    train["shards"],
                ],
                ["validation", valid["sequences"], valid["tokens"], share, valid["shards"]],
            ],
        ),
        f"{_decimal(total['bases_per_token'], 3)} bases a token, G + C {_decimal(total['gc_percent'], 2)} %. These two, "
        f"and lengths of tokens and sequences, were counted in {read} the training data; all others are the manifest's. "
        "A species is one input file; [species.tsv](species.tsv) has all of them, with their checksums.",
    ]


def _settings(dataset: Dataset) -> str:
    manifest = dataset.manifest
    tokenizer = manifest["tokenizer"]
    rows = [[text, manifest[key]] for key, text in SETTINGS.items()]
    rows += [
        ["tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens"],
        ["tokenizer.json, sha256", f"`{tokenizer['sha256']}`"],
        ["manifest.json, sha256", f"`{dataset.sha256}`"],
    ]
    return _table(["setting", "value"], rows, align="lr")


def _species(rows: Sequence[tuple[str, str, list[int]]], tables: Tables) -> str:
    """What categories (their column is left out then) or species contribute."""
    single = any(category for _, category, _ in rows)
    head = ["species", "category"] if single else ["category", "species"]
    lines = []
    for name, category, numbers in rows:
        sums = tables.of(numbers)
        lines.append(
            [
                name,
                category if single else sums["species"],
                bases(sums["bases_in"]),
                percent(sums["bases_kept"], sums["bases_in"]),
                sums["sequences_train"],
                sums["sequences_valid"],
                sums["tokens_train"],
                percent(sums["tokens_train"], tables.total["tokens_train"]),
                _decimal(sums["bases_per_token"], 3),
                _decimal(sums["gc_percent"], 1),
            ]
        )
    head += [
        "bases in",
        "kept",
        "training sequences",
        "validation sequences",
        "training tokens",
        "weight",
        "bases a token",
        "G + C, %",
    ]
    return _table(head, lines, align="ll" if single else "lr")


def _without_validation(tables: Tables) -> str:
    without = [number for number in tables.order if not tables.species[number]["sequences"]["valid"]]
    if not without:
        return "Every species has validation data."
    share = tables.of(without)["train_percent"]
    names = ", ".join(_cell(tables.species[number]["name"]) for number in without[:NAMES])
    more = f" and {len(without) - NAMES:,} more" if len(without) > NAMES else ""
    return (
        f"No validation data: {len(without):,} species with {share:.2f} % of the training tokens ({names}{more}). "
        "Of small genomes no region may have been drawn, or duplicates took what was."
    )


def _dropped(tables: Tables) -> str:
    """Bases left out, by reason, of categories and of the species that lost most."""
    reasons = [key for key in REASONS if tables.total[key]]
    if not reasons:
        return "None: every base stands in a sequence."

    def line(name: str, numbers: Sequence[int]) -> list[Any]:
        sums = tables.of(numbers)
        lost = sum(sums[key] for key in REASONS)
        return [name, sums["bases_in"], lost, *(percent(sums[key], sums["bases_in"]) for key in reasons)]

    lost = {number: sum(row["bases"]["dropped"].values()) for number, row in enumerate(tables.species)}
    most = sorted((number for number in lost if lost[number]), key=lambda number: -lost[number])[: ROWS // 2]
    rows = [line("**all**", range(len(tables.species)))]
    rows += [line(f"**{_cell(name)}**", numbers) for name, numbers in list(tables.categories.items())[:ROWS]]
    rows += [line(tables.species[number]["name"], [number]) for number in most]
    table = _table(["category, or species", "bases in", "left out", *(REASONS[key] for key in reasons)], rows)
    note = f"Per cent of the bases in. Below the categories, in bold, are the {len(most)} species that lost most bases."
    return f"{table}\n\n{note}"


def _tokens(codec: Codec, sample: Sample) -> str:
    counts, lengths = sample.length_counts, np.arange(len(sample.length_counts))
    content, all_counts = codec.token_bases > 0, max(1.0, float(counts.sum()))
    return (
        f"{int((sample.token_uses[content] > 0).sum()):,} of the {int(content.sum()):,} tokens that spell bases occur. "
        f"A sequence has {float(counts @ lengths) / all_counts:.1f} tokens on average; "
        f"{100 * counts[-1] / all_counts:.1f} % of them are full, with {len(counts) - 1} tokens."
    )


def _duplicates(manifest: dict[str, Any]) -> list[str]:
    found = manifest["duplicates"]
    if not found["exact"] + found["near"]:
        return [f"None removed (duplicates removed: {manifest['duplicates_removed']})."]
    kept = sum(split["sequences"] for split in manifest["splits"].values())
    pairs = sorted(found["from"], key=lambda pair: (-pair["exact"] - pair["near"], pair["species"], pair["kept_in"]))
    rows = [[pair["species"], pair["kept_in"], pair["exact"], pair["near"]] for pair in pairs[:ROWS]]
    if rest := pairs[ROWS:]:
        sums = (sum(pair[kind] for pair in rest) for kind in ("exact", "near"))
        rows.append([f"({len(rest):,} more pairs)", "", *sums])
    return [
        f"{found['exact']:,} sequences were removed because the same bases, or their reverse complement, are elsewhere, "
        f"and {found['near']:,} because most of their k-mers are elsewhere; {kept:,} sequences are left.",
        _table(["removed from", "kept in", "exact", "near"], rows, align="ll"),
    ]


def _exclusions(manifest: dict[str, Any]) -> str:
    excluded = manifest["excluded"]
    if not excluded:
        return "None: no list was given to `finalize`."
    return f"{excluded['sequences']:,} sequences that stand on a list (sha256 `{excluded['sha256']}`) were left out."


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], align: str = "l") -> str:
    """A Markdown table; columns after those of `align` are flush right."""
    sides = [":--" if side == "l" else "--:" for side in align.ljust(len(head), "r")]
    lines = [head, sides, *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|")


def _decimal(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(part: float, whole: float) -> str:
    """A share; rounding makes it neither nothing nor everything."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.01:
        return "< 0.01 %"
    return "> 99.99 %" if 99.99 < share < 100 else "0" if share == 0 else f"{share:.2f} %"


def bases(count: int) -> str:
    """A number of bases with its unit."""
    for unit, size in (("Gb", 10**9), ("Mb", 10**6), ("kb", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} b"
