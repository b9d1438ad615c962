"""`python -m finetune report`: tables and a picture of all runs of a results folder, for readers who doubt them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.cli import log, write_atomically
from finetune.report import compare as comparing
from finetune.report.collect import collect
from finetune.report.markdown import markdown
from finetune.report.plot import draw
from finetune.report.tables import differences_csv, scores_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="the --out of the runs")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets table.md, table.csv, comparison.csv, scores.png"
    )
    parser.add_argument(
        "--reference",
        metavar="LABEL",
        help="the model that others are compared with (default: the only one fully fine-tuned from random weights)",
    )
    text = "show these two models only, B beside A, and say in a paragraph which is better"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=text)
    text = "score on those test rows alone whose sequence is in neither train nor dev"
    parser.add_argument("--clean", action="store_true", help=text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb."""
    return report(args.results, args.out, args.reference, args.compare, args.clean)


def report(
    results: Path,
    out: Path,
    reference: str | None = None,
    compare: Sequence[str] | None = None,
    clean: bool = False,
) -> dict[str, Any]:
    """Write table.md, table.csv, comparison.csv and scores.png of the runs below `results` to `out`.

    Args:
        reference: the model that others are compared with; None: see `finetune.report.compare.choose`.
        compare: only these two models, the first one being the reference.
        clean: leave out test rows that are leaked.

    Returns:
        What `--json` prints. `runs` ended, collapsed ones too; `rows` are those of the table; `verdict` is None without
        `compare`.

    Raises InputError for files that are no results, and for models that have none.
    """
    rows, reference = comparing.choose(collect(results, clean), reference, compare)
    replicates = comparing.bootstrap(rows)
    differences = comparing.differences(rows, replicates, reference)
    means = comparing.averages(rows, replicates, differences)
    verdict = None
    if compare is not None:
        verdict = comparing.verdict(differences, model=compare[1], reference=compare[0])
    text = markdown(rows, replicates, differences, means, reference, verdict, clean)
    write_atomically(out / "table.csv", scores_csv(rows, replicates).encode())
    write_atomically(out / "comparison.csv", differences_csv(differences, reference).encode())
    write_atomically(out / "scores.png", draw(rows, replicates))
    write_atomically(out / "table.md", text.encode())  # last: job chains take it for the whole
    for row in rows:
        if row.collapsed or row.failed:
            log(f"{row.task}, {row.model}: {row.note}")
    if verdict is not None:
        log(verdict)
    runs = sum(len(row.runs) + len(row.collapsed) for row in rows)
    log(f"{out / 'table.md'}, table.csv, comparison.csv, scores.png: {runs} runs, {len(rows)} rows")
    return {
        "runs": runs,
        "rows": len(rows),
        "tasks": len({row.task for row in rows}),
        "collapsed": sum(len(row.collapsed) for row in rows),
        "failed": sum(len(row.failed) for row in rows),
        "reference": reference,
        "verdict": verdict,
        "table": str(out / "table.md"),
        "plot": str(out / "scores.png"),
    }
