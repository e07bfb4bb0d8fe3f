"""What lm-evaluation-harness returns for a task, as plain JSON values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lors_cli.output import console

_SCORES = ("acc", "acc_norm")


@dataclass(frozen=True)
class TaskResult:
    """A task's scores as plain JSON values; what is not a finite number is None."""

    metrics: dict[str, float | int | None]
    """acc, acc_stderr, acc_norm, acc_norm_stderr, other metrics of the task, num_samples."""
    samples: list[dict[str, Any]]
    """A document each: doc_id, target, log_likelihoods of the choices (or responses, and what was generated where a
    filter made them of it), acc, acc_norm: 0, 1 or, where the task has such, a fraction."""


def plain_result(task: str, title: str, results: dict[str, Any]) -> TaskResult:
    """The scores of `task` in what `lm_eval.evaluate` returns; none, with a warning, for a model that gives NaN."""
    samples = [_plain_sample(sample) for sample in results["samples"][task]]
    metrics: dict[str, float | int | None] = {}
    for name, value in results["results"][task].items():
        metric, _, choice = name.partition(",")
        if choice:
            metrics[metric if choice == "none" else name] = finite(value)
    broken = sum(1 for sample in results["samples"][task] if _has_nan(sample["filtered_resps"]))
    if broken:  # the largest of NaNs is the first one: such an accuracy says nothing
        console.warn(f"{title}: the model gives NaN on {broken} of {len(samples)} documents; there is no score")
        metrics = dict.fromkeys(metrics)
    metrics["num_samples"] = int(results["n-samples"][task]["effective"])
    return TaskResult(metrics, samples)


def _plain_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one document: not its text, which the data has."""
    plain: dict[str, Any] = {"doc_id": int(sample["doc_id"]), "target": _plain_value(sample["target"])}
    if sample["filter"] != "none":
        plain["filter"] = sample["filter"]
    answers = sample["filtered_resps"]
    if answers and all(isinstance(answer, tuple) and len(answer) == 2 for answer in answers):
        plain["log_likelihoods"] = [finite(answer[0]) for answer in answers]
    else:
        plain["responses"] = _plain_value(answers)
        raw = _plain_value(sample["resps"])
        if sample["filter"] != "none" and raw != [plain["responses"]]:
            plain["generated"] = raw
    for name in sample["metrics"]:
        value = _plain_value(sample[name])
        plain[name] = int(value) if name in _SCORES and value in (0, 1) else value  # 1, not 1.0 or true
    return plain


def _plain_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    number = finite(value)
    return str(value) if number is None and not _is_number(value) else number


def finite(value: Any) -> float | int | None:
    """The value as a plain number, None when it is none or not a finite one."""
    if not _is_number(value):
        return None
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _has_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_nan(item) for item in value)
    return isinstance(value, float) and math.isnan(value)
