"""The result of an audit as Markdown tables, as CSV with a row a task and split, and as a line of the log."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

SHOWN_CLASSES = 4  # whose rows stand in the table one by one
COLUMNS = (  # of audit.csv after `task` and `split`; empty: not counted, or there was no such file
    *("rows", "published", "kind", "classes", "rows_a_class", "largest_share", "label_min", "label_mean", "label_max"),
    *("bases_min", "bases_median", "bases_max", "second_bases_min", "second_bases_median", "second_bases_max"),
    *("other_letters", "rows_with_other_letters", "repeats", "in_train", "in_train_other_label", "in_dev"),
    *("repeats_either_strand", "in_train_either_strand", "in_train_other_label_either_strand", "in_dev_either_strand"),
    *("several_labels", "tokens_mean", "tokens_p99", "tokens_max", "max_length", "over_max_length"),
)


def as_csv(result: Mapping[str, Any]) -> str:
    """A row a task and split; classes as `0:952 1:955`."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ("task", "split", *COLUMNS), lineterminator="\n")
    writer.writeheader()
    for name, split, row in _rows(result):
        task = result["tasks"][name]
        each = row.get("rows_a_class")
        said = {"rows_a_class": " ".join(f"{label}:{count}" for label, count in each.items())} if each else {}
        of_task = {key: task[key] for key in ("kind", "classes", "max_length")}
        writer.writerow({"task": name, "split": split, **of_task, **row, **said})
    return stream.getvalue()


def as_line(name: str, task: Mapping[str, Any]) -> str:
    """The numbers of a task that matter most."""
    splits = task["splits"]
    if not splits:
        return f"{name}: no file of it can be read"
    held = [
        f"{split} rows in {other} {_count(row[f'in_{other}'])} (either strand {_count(row[f'in_{other}_either_strand'])})"
        for split, row in splits.items()
        for other in ("train", "dev")
        if row.get(f"in_{other}") is not None
    ]
    parts = [
        f"{'/'.join(_count(row['rows']) for row in splits.values())} rows of {'/'.join(splits)}",
        task["kind"] if task["classes"] is None else f"{task['classes']} classes",
        *held,
        f"{task['contradictory']:,} sequences with several labels",
    ]
    if over := _over(splits.values()):
        parts.append(f"{over} over {task['max_length']} tokens")
    return f"{name}: {', '.join(parts)}"


def as_markdown(result: Mapping[str, Any]) -> str:
    """All tables, and what they don't show."""
    tasks = {name: task for name, task in result["tasks"].items() if task["splits"]}
    lines = [f"# Audit of {result['path']}", ""]
    lines += _rows_table(result)
    lines += _twins_table(result)
    lines += _labels_table(tasks)
    if result["tokenizer"] is not None:
        lines += _tokens_table(result)
    for title, key in (("Notes", "notes"), ("Could not be audited", "problems")):
        if said := [f"* {name}: {text}" for name, task in result["tasks"].items() for text in task[key]]:
            lines += [f"## {title}", "", *said, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _rows_table(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, split, row in _rows(result):
        task = result["tasks"][name]
        letters = (_count(row["other_letters"]), _count(row["rows_with_other_letters"]))
        counts = (_count(row["rows"]), _count(row["published"]))
        rows.append((name, split, *counts, *_classes(row, task["classes"]), _bases(row), *letters))
    head = ("task", "split", "rows", "published", "classes", "rows a class", "largest", "bases", "other letters", "in rows")
    return [
        "## Rows",
        "",
        *_table(head, rows, text=2),
        "Published: rows of the benchmark's files. Bases: shortest–longest (median), where they differ. Other letters: than "
        "A, C, G, T, lower case among them; most tokenizers make [UNK] of them.",
        "",
    ]


def _classes(row: Mapping[str, Any], classes: int | None) -> tuple[str, str, str]:
    if classes is None:
        return "-", f"{row['label_min']:.4g} to {row['label_max']:.4g}, mean {row['label_mean']:.4g}", "-"
    each = row["rows_a_class"]
    if each is None:
        shown = "-"
    elif len(each) <= SHOWN_CLASSES:
        shown = "/".join(map(str, each.values()))
    else:
        shown = f"{min(each.values())}–{max(each.values())}"
    return str(classes), shown, f"{100 * row['largest_share']:.1f} %"


def _bases(row: Mapping[str, Any]) -> str:
    shown = []
    for prefix in ("", "second_"):
        if f"{prefix}bases_min" in row:
            low, middle, high = (row[f"{prefix}bases_{name}"] for name in ("min", "median", "max"))
            shown.append(f"{low:g}" if low == high else f"{low:g}–{high:g} ({middle:g})")
    return ", ".join(shown)


def _twins_table(result: Mapping[str, Any]) -> list[str]:
    keys = ("repeats", "in_train", "in_train_other_label", "in_dev")
    rows = [
        (name, split, *(_count(row.get(f"{key}{suffix}")) for suffix in ("", "_either_strand") for key in keys))
        for name, split, row in _rows(result)
    ]
    head = ("repeats", "in train", "other label", "in dev")
    return [
        "## Rows that stand twice",
        "",
        *_table(("task", "split", *head, *(f"{name}, either strand" for name in head)), rows, text=2),
        "Repeats: rows that repeat an earlier one of their split. In train, in dev: rows whose sequence stands there. Other "
        "label: those of them that train has with another label. Either strand: a reverse complement is the same sequence, "
        "and so is one in lower case.",
        "",
    ]


def _labels_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    keys = ("inputs", "contradictory", "contradictory_in_train")
    strands = ("contradictory_either_strand", "contradictory_in_train_either_strand")
    rows = [(name, *(_count(task[key]) for key in (*keys, *strands))) for name, task in tasks.items()]
    head = ("task", "distinct sequences", "with several labels", "in train", "either strand", "in train, either strand")
    return ["## Sequences with several labels", "", *_table(head, rows, text=1)]


def _tokens_table(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, split, row in _rows(result):
        numbers = (f"{row['tokens_mean']:.1f}", _count(row["tokens_p99"]), _count(row["tokens_max"]))
        rows.append((name, split, *numbers, _count(result["tasks"][name]["max_length"]), _over([row]) or "-"))
    return [
        "## Tokens",
        "",
        *_table(("task", "split", "mean", "p99", "max", "maximum length", "rows over it"), rows, text=2),
        f"A row under {result['tokenizer']}, with [CLS] and [SEP].",
        "",
    ]


def _over(rows: Iterable[Mapping[str, Any]]) -> str:
    """The share of rows that truncation would cut; nothing where that was not counted."""
    counted = [row for row in rows if row.get("over_max_length") is not None]
    total = sum(row["rows"] for row in counted)
    return f"{100 * sum(row['over_max_length'] for row in counted) / total:.2f} %" if counted else ""


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, task in result["tasks"].items():
        for split, row in task["splits"].items():
            yield name, split, row


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int) -> list[str]:
    """A Markdown table and a blank line; all columns but the first `text` to the right."""
    rules = ["---"] * text + ["---:"] * (len(head) - text)
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *rows)] + [""]


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
