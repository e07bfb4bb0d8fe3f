"""Results as CSV: one line a number, so that any table can be made of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence

from lors_cli.evaluation.summary import LOST_IN_ERROR
from lors_cli.recipe.tuning import data_name
from lors_cli.report.measures import Group, Measure, ScoredModel, measures

HEADER = (
    "group", "label", "cells", "role", "model", "prune", "pattern", "tune", "data", "settings", "status",
    "measure", "name", "unit", "value", "stderr", "paper", "ours_minus_paper", "error",
)  # fmt: skip
_MADE = {
    "sparsity": "share", "violations": "weights", "first_loss": "nats per token", "last_loss": "nats per token",
    "loss_before": "nats per token", "loss_after": "nats per token", "moved": "share",
    "steps": "steps", "tokens_per_s": "tokens/s", "trainable_parameters": "parameters", "peak_bytes": "bytes",
}  # fmt: skip
"""Numbers of a stage's record, with their units."""
_PACKED = {"bytes_before": "plain_bytes", "bytes": "packed_bytes"}
"""Numbers of the record of `pack`, with their names here."""

Line = dict[str, str | float | None]


def to_csv(groups: Sequence[Group]) -> str:
    """The scores and costs of every model under `HEADER`; what is not known is empty."""
    models = [model for group in groups for model in group.models]
    columns = measures(models, every_metric=True, subtasks=True)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, HEADER, restval="", lineterminator="\n")
    writer.writeheader()
    for group in groups:
        for model in group.models:
            for line in _lines(model, columns):
                rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in line.items()}
                writer.writerow({"group": group.title, **_identity(model), **rounded})
    return buffer.getvalue()


def _identity(model: ScoredModel) -> Line:
    return {
        "label": model.label, "cells": " ".join(model.cells), "role": model.role, "model": model.base,
        "prune": model.prune.get("method"), "pattern": model.prune.get("pattern"), "tune": model.tune.get("method"),
        "data": data_name(model.tune.get("data") or {}),
        "settings": json.dumps(model.settings, ensure_ascii=False) if model.settings else "", "status": model.status,
    }  # fmt: skip


def _lines(model: ScoredModel, columns: list[Measure]) -> Iterator[Line]:
    """One line a number; a model without any has one line that says why."""
    empty = True
    for column in columns:
        value = column.value(model)
        if value is None:
            if column.kind == "recovered" and column.name in model.shares:
                yield {"measure": column.kind, "name": column.name, "unit": "percent", "error": LOST_IN_ERROR}
            continue
        empty = False
        paper = column.paper(model)
        yield {
            "measure": column.metric or column.kind, "name": column.name,
            "unit": "percent" if column.is_percent else "per token" if column.kind == "perplexity" else "",
            "value": value, "stderr": column.stderr(model), "paper": paper,
            "ours_minus_paper": None if paper is None else value - paper,
        }  # fmt: skip
    metrics = model.made.metrics if model.made else {}
    for name, unit in _MADE.items():
        if metrics.get(name) is not None:
            yield {"measure": name, "unit": unit, "value": metrics[name]}
    if model.packed:
        for name, measure in _PACKED.items():
            yield {"measure": measure, "unit": "bytes", "value": model.packed.metrics[name]}
    for record in filter(None, (model.made, model.packed)):
        yield {"measure": "elapsed", "name": record.stage, "unit": "s", "value": record.elapsed_s}
    if model.eval_s is not None:
        yield {"measure": "elapsed", "name": "eval", "unit": "s", "value": model.eval_s}
    if empty:
        yield {"error": model.error or ""}
