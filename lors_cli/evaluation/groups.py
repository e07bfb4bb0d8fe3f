"""The rows of tasks and groups in a model's results; groups are put together as lm-eval does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors_cli.evaluation.entries import Aggregate, Entry, Group, tasks_of

Metrics = dict[str, Any]


def task_rows(entries: Sequence[Entry], scores: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """Metrics by name, with the number of examples: each group's, then those of its members."""
    rows: dict[str, Metrics] = {}
    for entry in entries:
        if isinstance(entry, Group):
            rows |= {entry.name: _group_row(entry, scores)} | task_rows(entry.members, scores)
        else:
            rows[entry.name] = {**scores[entry.name], "num_fewshot": entry.num_fewshot}
    return rows


def _group_row(group: Group, scores: Mapping[str, Metrics]) -> Metrics:
    tasks = tasks_of([group])
    found = [scores[task.name] for task in tasks]
    row: Metrics = {}
    for aggregate in group.metrics:
        for key in _keys(aggregate, found):
            row |= _aggregated(key, aggregate.weight_by_size, [metrics for metrics in found if key in metrics])
    row["num_samples"] = sum(metrics["num_samples"] for metrics in found)
    shots = {task.num_fewshot for task in tasks}
    return row | ({"num_fewshot": shots.pop()} if len(shots) == 1 else {})


def _keys(aggregate: Aggregate, found: Sequence[Metrics]) -> list[str]:
    """The names under which tasks have a group's metric: `acc`, or one for each filter, `exact_match,strict-match`."""
    there = dict.fromkeys(key for metrics in found for key in metrics if key.partition(",")[0] == aggregate.metric)
    if aggregate.filters is None:
        return list(there)
    wanted = [aggregate.metric if name == "none" else f"{aggregate.metric},{name}" for name in aggregate.filters]
    return [key for key in wanted if key in there]


def _aggregated(key: str, weight_by_size: bool, found: Sequence[Metrics]) -> Metrics:
    """A metric of a group and its standard error; None where a task's is."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    metric, comma, name = key.partition(",")
    error_key = f"{metric}_stderr{comma}{name}"
    values, errors = [metrics[key] for metrics in found], [metrics.get(error_key) for metrics in found]
    sizes = [metrics["num_samples"] for metrics in found]
    if None in values:
        return {key: None, error_key: None}
    error = None
    if None not in errors:
        error = float(pooled_sample_stderr(errors, sizes) if weight_by_size else unweighted_mean_stderr(errors))
    return {key: float(aggregate_subtask_metrics(values, sizes, weight_by_size)), error_key: error}
