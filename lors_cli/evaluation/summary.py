"""What the scores of several models say side by side."""

from __future__ import annotations

import math
from typing import Any

_NONE = "–"
_AVERAGE = "average acc"


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


def summary_table(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The scores side by side: accuracies in percent with their standard error, then perplexities.

    Behind each model but the first stands its difference to `dense` (or, where there is none, to the first), and
    last the share that tuning recovered. A task with acc_norm has it in the row below its acc.

    Args:
        results: as `evaluate` returns them, one model or more.

    Returns:
        Column titles and rows of text, for `console.table`.
    """
    labels = list(results)
    base = "dense" if "dense" in results else labels[0]
    shares = recovered(results)
    rows = []
    for title, kind, values, errors, share_key in _lines(results):
        cells = [title]
        for label in labels:
            cells.append(_cell(kind, values[label], errors[label]))
            if label != base:
                cells.append(_difference(kind, values[label], values[base]))
        if shares:
            cells.append(f"{shares[share_key]:.1%}" if share_key in shares else "")
        rows.append(cells)
    columns = ["task"]
    for label in labels:
        columns += [label] if label == base else [label, f"Δ {base}"]
    return [*columns, *(["recovered"] if shares else [])], rows


_Values = dict[str, float | None]


def _lines(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, _Values, _Values, str]]:
    """Every row's title, kind of number, values and standard errors by model, and its key in `recovered`."""

    def row(title: str, kind: str, section: str, name: str, metric: str, key: str = "") -> Any:
        def read(field: str) -> _Values:
            return {label: result[section].get(name, {}).get(field) for label, result in results.items()}

        return title, kind, read(metric), read(f"{metric}_stderr"), key

    lines = []
    for task, metric in _task_metrics(results):
        kind = "share" if metric in ("acc", "acc_norm") else "number"
        title = task if metric == "acc" else "  acc_norm" if metric == "acc_norm" else f"{task} {metric}"
        lines.append(row(title, kind, "tasks", task, metric))
    averages: _Values = {label: result["average"]["value"] for label, result in results.items()}
    if any(value is not None for value in averages.values()):
        lines.append((_AVERAGE, "share", averages, dict.fromkeys(results), "accuracy"))
    for text in dict.fromkeys(text for result in results.values() for text in result["perplexity"]):
        lines.append(row(f"perplexity {text}", "number", "perplexity", text, "value", f"perplexity {text}"))
    return lines


def _task_metrics(results: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """The metrics shown: acc and acc_norm, or whatever a task has that has neither."""
    merged: dict[str, dict[str, None]] = {}
    for result in results.values():
        for task, metrics in result["tasks"].items():
            merged.setdefault(task, {}).update(dict.fromkeys(metrics))
    pairs = []
    for task, metrics in merged.items():
        usual = [name for name in ("acc", "acc_norm") if name in metrics]
        others = [name for name in metrics if not name.endswith("_stderr") and "_stderr," not in name]
        pairs += [(task, name) for name in usual or others if name != "num_samples"]
    return pairs


def _cell(kind: str, value: float | None, error: float | None) -> str:
    if value is None:
        return _NONE
    if kind == "number":
        return f"{value:.4g}" if abs(value) >= 1e5 else f"{value:.3f}"
    return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")


def _difference(kind: str, value: float | None, base: float | None) -> str:
    if value is None or base is None:
        return _NONE
    change = value - base
    if kind == "number":
        return f"{change:+.4g}" if abs(change) >= 1e5 else f"{change:+.3f}"
    return f"{100 * change:+.2f}"
