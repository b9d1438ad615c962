"""Intervals of rows, differences of models to a reference, and means over the groups of tasks that the paper has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_prep.cli import InputError
from finetune.report.collect import SHOWN_PUBLISHED, Row, mean, published_scores
from finetune.report.statistics import Floats, draw_seeds, holm, interval, p_value, run_replicates
from finetune.tasks import GROUPS

SIGNIFICANT = 0.05  # of a p value after Holm's adjustment
Replicates = Mapping[tuple[str, str], Floats]  # (task, model) -> [b] scores x 100
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """A model's mean score less the reference's, on one task. None: not known."""

    task: str
    model: str
    difference: float | None
    replicates_b: Floats | None
    note: str = ""
    interval: Interval = None
    p: float | None = None
    p_holm: float | None = None  # over the model's tasks


@dataclass(frozen=True)
class Average:
    """A model's mean over the tasks of a group."""

    group: str
    model: str
    tasks: tuple[str, ...]  # with a score
    size: int  # tasks of the group
    mean: float | None
    interval: Interval
    difference: float | None  # to the reference, over the tasks that both have
    difference_interval: Interval
    shared: int  # number of those
    published: tuple[float | None, ...]  # means of SHOWN_PUBLISHED over the same tasks
    fewer: bool  # tasks with a score than other models have
    note: str


def choose(rows: Sequence[Row], reference: str | None, models: Sequence[str] | None) -> tuple[list[Row], str | None]:
    """The rows to show, and the model that the others are compared with.

    Of a comparison (`models`) it is the first; else the one named, or the one fully fine-tuned from random weights if there
    is exactly one. Raises InputError for models that have no runs.
    """
    there = list(dict.fromkeys(row.model for row in rows))
    if models is not None and (len(set(models)) != 2 or reference is not None):
        raise InputError("--compare A B takes two models, of which A is the reference; leave out --reference")
    for label in [*(models or ()), *([reference] if reference else [])]:
        if label not in there:
            raise InputError(f"no runs of a model called {label!r}; there are {', '.join(there)}")
    if models is not None:
        return [row for row in rows if row.model in models], models[0]
    if reference is None and len(there) > 1:
        random = {
            row.model
            for row in rows
            for result in row.results
            if result["source"]["kind"] == "random" and result["method"] == "full"
        }
        reference = random.pop() if len(random) == 1 else None
    return list(rows), reference


def bootstrap(rows: Sequence[Row]) -> dict[tuple[str, str], Floats]:
    """Replicates of each row's mean score; those of a task share the drawn test rows where the rows are the same."""
    alike: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.predictions:
            alike[row.task, row.predictions[0].rows].append(row)
    replicates = {}
    for (task, _), group in alike.items():
        all_runs = [predictions for row in group for predictions in row.predictions]
        scores_rb = 100 * run_replicates(
            group[0].metric,
            all_runs[0].labels_n,
            [predictions.outputs_n for predictions in all_runs],
            max(predictions.classes for predictions in all_runs),
            task,
        )
        ends = np.cumsum([len(row.runs) for row in group])[:-1]
        for row, part_rb in zip(group, np.split(scores_rb, ends), strict=True):
            replicates[row.key] = draw_seeds(part_rb, task, row.model)
    return replicates


def differences(rows: Sequence[Row], replicates: Replicates, reference: str | None) -> list[Difference]:
    """Every other model beside the reference, task by task; none without a reference."""
    if reference is None:
        return []
    base = {row.task: row for row in rows if row.model == reference}
    found = [_difference(row, base.get(row.task), replicates) for row in rows if row.model != reference]
    adjusted: dict[tuple[str, str], float] = {}
    for model in {one.model for one in found}:
        tested = [one for one in found if one.model == model and one.p is not None]
        p_values = holm([one.p for one in tested if one.p is not None])
        adjusted |= {(one.task, one.model): p for one, p in zip(tested, p_values, strict=True)}
    return [replace(one, p_holm=adjusted.get((one.task, one.model))) for one in found]


def _difference(row: Row, base: Row | None, replicates: Replicates) -> Difference:
    if base is None or base.mean is None or row.mean is None:
        lacking = row.model if row.mean is None else "the reference"
        return Difference(row.task, row.model, None, None, f"{lacking} has no score here")
    if row.key not in replicates or base.key not in replicates:
        return Difference(row.task, row.model, row.mean - base.mean, None, "not tested, an interval is missing")
    if row.predictions[0].rows != base.predictions[0].rows:
        return Difference(row.task, row.model, None, None, "not compared, the test rows are not the same")
    draws_b = replicates[row.key] - replicates[base.key]
    difference = row.mean - base.mean
    return Difference(row.task, row.model, difference, draws_b, "", interval(draws_b), p_value(draws_b))


def averages(rows: Sequence[Row], replicates: Replicates, found: Sequence[Difference]) -> list[Average]:
    """Means over each group that any row is in, and over all of the benchmark."""
    groups = {**GROUPS, "all": tuple(task for tasks in GROUPS.values() for task in tasks)}
    models = list(dict.fromkeys(row.model for row in rows))
    by_key, differ = {row.key: row for row in rows}, {(one.task, one.model): one for one in found}
    result = []
    for group, tasks in groups.items():
        here = [row for row in rows if row.task in tasks]
        any_score = {row.task for row in here if row.mean is not None}
        for model in models if here else ():
            mine = [by_key[task, model] for task in tasks if (task, model) in by_key]
            result.append(_average(group, model, len(tasks), mine, any_score, replicates, differ))
    return result


def _average(
    group: str,
    model: str,
    size: int,
    mine: Sequence[Row],
    any_score: set[str],
    replicates: Replicates,
    differ: Mapping[tuple[str, str], Difference],
) -> Average:
    scored = [row for row in mine if row.mean is not None]
    shared = [differ[row.key] for row in scored if row.key in differ and differ[row.key].difference is not None]
    lacking = sorted(any_score - {row.task for row in scored})
    notes = []
    if lost := [row.task for row in mine if row.mean is None]:
        notes.append(f"no run of {', '.join(lost)} counts")
    if absent := sorted(set(lacking) - set(lost)):
        notes.append(f"no run of {', '.join(absent)}, of which other models have some")
    published = published_scores()
    return Average(
        group,
        model,
        tuple(row.task for row in scored),
        size,
        mean([row.mean for row in scored if row.mean is not None]),
        _mean_interval([replicates.get(row.key) for row in scored]),
        mean([one.difference for one in shared if one.difference is not None]),
        _mean_interval([one.replicates_b for one in shared]),
        len(shared),
        tuple(mean([published[row.task][name] for row in scored]) for name in SHOWN_PUBLISHED),
        bool(lacking),
        "; ".join(notes),
    )


def _mean_interval(replicates: Sequence[Floats | None]) -> Interval:
    """Of the mean over tasks, which are drawn independently; None if one is missing."""
    there = [replicates_b for replicates_b in replicates if replicates_b is not None]
    return interval(np.mean(there, axis=0)) if there and len(there) == len(replicates) else None


def verdict(found: Sequence[Difference], model: str, reference: str) -> str:
    """One paragraph about two models."""
    known = [(one, one.difference) for one in found if one.difference is not None]
    if not known:
        return f"`{model}` and `{reference}` have no task in which both have a score on the same test rows."
    values = [difference for _, difference in known]
    tested = [(difference, one.p_holm) for one, difference in known if one.p_holm is not None]
    better, worse = (sum(sign * difference > 0 for difference in values) for sign in (1, -1))
    sure = [difference for difference, p in tested if p <= SIGNIFICANT]
    sure_better, sure_worse = (sum(sign * difference > 0 for difference in sure) for sign in (1, -1))
    spread = _mean_interval([one.replicates_b for one, _ in known])
    reach = f" (95 % interval {spread[0]:+.2f} to {spread[1]:+.2f}, of rows and seeds on these tasks)" if spread else ""
    untested = f" {len(known) - len(tested)} could not be tested." if len(known) > len(tested) else ""
    left_out = f" {len(found) - len(known)} more could not be compared." if len(found) > len(known) else ""
    return (
        f"Of {len(known)} tasks `{model}` is better than `{reference}` in {better} and worse in {worse}; significantly, at "
        f"{SIGNIFICANT} after Holm's adjustment, better in {sure_better} and worse in {sure_worse}. "
        f"The mean difference is {np.mean(values):+.2f}{reach}.{untested}{left_out}"
    )
