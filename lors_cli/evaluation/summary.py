"""What the scores of several models say side by side."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any


def average(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The unweighted mean accuracy of those `tasks` (metrics by task) that have one.

    Returns:
        {"metric": "acc", "value", "tasks"}; the value is None when no task has an accuracy, or one of them has
        none because the model is broken.
    """
    names = [name for name, metrics in tasks.items() if "acc" in metrics]
    values = [tasks[name]["acc"] for name in names]
    value = fmean(values) if values and None not in values else None
    return {"metric": "acc", "value": value, "tasks": names}


def average_stderr(tasks: dict[str, dict[str, Any]]) -> float | None:
    """The standard error of `average`'s value, the tasks being independent; None where a task's own is missing."""
    errors: list[Any] = [metrics.get("acc_stderr") for metrics in tasks.values() if "acc" in metrics]
    if not errors or None in errors:
        return None
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def recovered(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The share of what pruning lost that tuning won back; 1 is all of it.

    It is (tuned − pruned) / (dense − pruned), of the average accuracy and of the logarithm of each perplexity.

    Returns:
        “accuracy” and “perplexity <text>” to the share; only those where dense, pruned and tuned have a value, of
        the same tasks, and pruning lost something.
    """
    if not {"dense", "pruned", "tuned"} <= results.keys():
        return {}
    trio = [results[label] for label in ("dense", "pruned", "tuned")]
    shares = {}
    if trio[0]["average"]["tasks"] == trio[1]["average"]["tasks"] == trio[2]["average"]["tasks"]:
        shares["accuracy"] = _share(*(result["average"]["value"] for result in trio))
    for text in trio[0]["perplexity"]:
        values = [result["perplexity"].get(text, {}).get("value") for result in trio]
        shares[f"perplexity {text}"] = _share(*(-math.log(value) if value else None for value in values))
    return {name: share for name, share in shares.items() if share is not None}


def _share(dense: float | None, pruned: float | None, tuned: float | None) -> float | None:
    """Of quantities that are better when larger."""
    if dense is None or pruned is None or tuned is None or dense <= pruned:
        return None
    return (tuned - pruned) / (dense - pruned)
