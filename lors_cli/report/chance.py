"""What guessing scores on a task: one over the number of choices, averaged over its documents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from lors_cli.evaluation.pieces import samples_path
from lors_cli.evaluation.samples import read_rows

_KNOWN = {"arc_challenge": 0.25, "arc_easy": 0.25, "boolq": 0.5, "hellaswag": 0.25, "openbookqa": 0.25, "rte": 0.5,
          "winogrande": 0.5}  # fmt: skip
"""Where there are no documents' results; a few questions of ARC have three or five choices."""


def chance_levels(folder: Path, contents: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Task to the accuracy of guessing, from the documents' results in an eval folder; without what is not known."""
    tasks = dict.fromkeys(task for content in contents.values() for task in content.get("tasks") or {})
    found = {task: _of_samples(samples_path(folder, label, task) for label in contents) or _KNOWN.get(task)
             for task in tasks}  # fmt: skip
    return {task: level for task, level in found.items() if level is not None}


def _of_samples(paths: Iterable[Path]) -> float | None:
    """Of the first of the files that is there; None where its documents are not of several choices, right or wrong."""
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    rows = read_rows(path)
    if any(row.get("acc", 0) not in (0, 1) for row in rows):  # a fraction is no count of right answers
        return None
    choices = [row.get("log_likelihoods") for row in rows]
    counts = [len(found) if isinstance(found, list) else 0 for found in choices]
    return fmean(1 / count for count in counts) if counts and min(counts) > 1 else None
