"""What the scores of several models say side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any


def average(tasks: dict[str, dict[str, Any]], names: Iterable[str] | None = None) -> dict[str, Any]:
    """The unweighted mean accuracy of those `tasks` (metrics by task) that have one.

    Args:
        names: those that count, by default all: a group counts once, not its subtasks.

    Returns:
        {"metric": "acc", "value", "tasks"}; the value is None when no task has an accuracy, or one of them has
        none because the model is broken.
    """
    names = [name for name in (tasks if names is None else names) if "acc" in tasks[name]]
    values = [tasks[name]["acc"] for name in names]
    value = fmean(values) if values and None not in values else None
    return {"metric": "acc", "value": value, "tasks": names}


def average_stderr(result: dict[str, Any]) -> float | None:
    """The standard error of a model's average, the tasks being independent; None where a task's own is missing."""
    tasks = result.get("tasks") or {}
    names = (result.get("average") or {}).get("tasks") or ()
    errors: list[Any] = [tasks.get(name, {}).get("acc_stderr") for name in names]
    if not errors or None in errors:
        return None
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


LOST_IN_ERROR = (
    "Where “—” stands for the share won back, pruning lost no more than the standard error of that difference, so a "
    "share of it would be chance."
)


def recovered(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The share of what pruning lost that tuning won back; 1 is all of it.

    It is (tuned − pruned) / (dense − pruned), of the average accuracy and of the logarithm of each perplexity.

    Returns:
        “accuracy” and “perplexity <text>” to the share; only those where dense, pruned and tuned have a value, of
        the same tasks, and pruning lost something. None where the loss is inside its own error (`LOST_IN_ERROR`).
    """
    if not {"dense", "pruned", "tuned"} <= results.keys():
        return {}
    trio = [results[label] for label in ("dense", "pruned", "tuned")]
    found: dict[str, tuple[list[float | None], float]] = {}
    if trio[0]["average"]["tasks"] == trio[1]["average"]["tasks"] == trio[2]["average"]["tasks"]:
        found["accuracy"] = [result["average"]["value"] for result in trio], _error_of_loss(*trio[:2])
    for text in trio[0]["perplexity"]:
        values = [result["perplexity"].get(text, {}).get("value") for result in trio]
        found[f"perplexity {text}"] = [-math.log(value) if value else None for value in values], 0.0
    shares: dict[str, float | None] = {}
    for name, ((dense, pruned, tuned), error) in found.items():
        if dense is not None and pruned is not None and tuned is not None and dense > pruned:
            shares[name] = (tuned - pruned) / (dense - pruned) if dense - pruned > error else None
    return shares


def _error_of_loss(dense: dict[str, Any], pruned: dict[str, Any]) -> float:
    """The standard error of the difference of two averages, taken as independent; 0 where it is not known."""
    errors = [average_stderr(result) for result in (dense, pruned)]
    return math.hypot(*(error for error in errors if error is not None)) if None not in errors else 0.0
