"""What the scores of several models say side by side."""

from __future__ import annotations

import math
from typing import Any


def average(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The unweighted mean accuracy of the tasks that have one.

    Args:
        tasks: metrics by task.

    Returns:
        {"metric": "acc", "value", "tasks"}; the value is None when no task has an accuracy, or one of them has
        none because the model is broken.
    """
    names = [name for name, metrics in tasks.items() if "acc" in metrics]
    values = [tasks[name]["acc"] for name in names]
    value = math.fsum(values) / len(values) if values and None not in values else None
    return {"metric": "acc", "value": value, "tasks": names}


def average_stderr(tasks: dict[str, dict[str, Any]]) -> float | None:
    """The standard error of `average`'s value: the tasks are independent, each with its own.

    Args:
        tasks: metrics by task.

    Returns:
        None where a task with an accuracy has no standard error.
    """
    scored = [metrics for metrics in tasks.values() if "acc" in metrics]
    if not scored or any(metrics.get("acc_stderr") is None for metrics in scored):
        return None
    return math.sqrt(math.fsum(metrics["acc_stderr"] ** 2 for metrics in scored)) / len(scored)


def recovered(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The share of what pruning lost that tuning won back; 1 is all of it.

    It is (tuned − pruned) / (dense − pruned), of the average accuracy and of the logarithm of each perplexity.

    Args:
        results: as `evaluate` returns them.

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
