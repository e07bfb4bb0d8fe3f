"""What was kept of every document and every window of text: the samples of an evaluation, read again."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from lors_cli.evaluation.pieces import samples_path
from lors_cli.evaluation.plain_results import finite
from lors_cli.output import console


def read_accuracies(folder: Path, label: str, result: Mapping[str, Any]) -> dict[str, dict[Any, float]]:
    """A model's accuracies by task and document; without tasks whose are not there, not numbers, or of other results.

    What lors wrote before it kept fractions is of other results: the documents' mean is not the task's accuracy.
    A document is known by its number, what is right of it, and how many examples stood before it.
    """
    accuracies = {}
    for name in result["average"]["tasks"]:
        tasks = _tasks_in(result, name)
        rows = [
            _read_documents(samples_path(folder, label, task), result["tasks"].get(task, {}).get("num_fewshot") or 0)
            for task in tasks
        ]
        if not all(rows):
            continue
        found = {
            (task, document): acc for task, part in zip(tasks, rows, strict=True) for document, acc in part.items()
        }
        score = result["tasks"].get(name, {}).get("acc") or 0
        if not math.isclose(fmean(found.values()), score, abs_tol=1e-6):  # maybe each task of a group counts the same
            sizes = {task: len(found) / len(tasks) / len(part) for task, part in zip(tasks, rows, strict=True)}
            found = {(task, document): sizes[task] * acc for (task, document), acc in found.items()}
        if not math.isclose(fmean(found.values()), score, abs_tol=1e-6):
            continue
        accuracies[name] = found if name in result.get("groups", {}) else {key[1]: acc for key, acc in found.items()}
    return accuracies


def read_windows(folder: Path, label: str, result: Mapping[str, Any]) -> dict[str, dict[Any, float]]:
    """A model's losses by text and window; without texts whose are not there, not finite, or of other results."""
    found = {}
    for text, score in result["perplexity"].items():
        path = samples_path(folder, label, text, "perplexity")
        rows = read_rows(path)
        losses = _numbers({(place, str(row.get("tokens"))): row.get("nll") for place, row in enumerate(rows)})
        if not losses or score["value"] is None:
            continue
        if math.isclose(fmean(losses.values()), math.log(score["value"]), abs_tol=1e-6):
            found[text] = losses
    return found


def _tasks_in(result: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group; a task's own name."""
    members = result.get("groups", {}).get(name)
    return [name] if members is None else [task for member in members for task in _tasks_in(result, member)]


def _read_documents(path: Path, num_fewshot: int) -> dict[Any, float]:
    """A task's accuracies by document; nothing where they are not there or not numbers."""
    return _numbers({(str(row.get("doc_id")), json.dumps(row.get("target")), num_fewshot): row.get("acc")
                     for row in read_rows(path) if "filter" not in row})  # fmt: skip


def _numbers(values: dict[Any, Any]) -> dict[Any, float]:
    """The values, if each is a finite number; else none of them."""
    known = {key: number for key, value in values.items() if (number := finite(value)) is not None}
    return known if len(known) == len(values) else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A piece's documents or windows; none where the file is not there, or, with a warning, not as lors wrote it."""
    if not path.is_file():
        return []
    with contextlib.suppress(ValueError, RecursionError):
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        if all(isinstance(row, dict) for row in rows):
            return rows
    console.warn(f"{path} is damaged: nothing is said of its documents or windows")
    return []
