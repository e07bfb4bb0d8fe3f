"""Scored models side by side, in the layout of the LoRS paper's tables, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lors_cli.output.markdown import NONE, Cell, Row, Table, escape
from lors_cli.report.measures import Group, Measure, ScoredModel, measures
from lors_cli.report.names import method_name
from lors_cli.report.paper import SOURCE, paper_rows


def results_table(groups: Sequence[Group]) -> Table:
    """One row a model; below it the paper's row, where it has one, with ours minus the paper's.

    Args:
        groups: in the order of the rows; the best pruned or tuned model of each is marked.
    """
    columns = measures(model for group in groups for model in group.models)
    rows = []
    for group in groups:
        best = _best(group, columns)
        if len(groups) > 1:
            rows.append(Row((Cell(group.title),), "group"))
        for model in group.models:
            label = model.label if model.status == "done" else f"{model.label} ({model.status})"
            cells = [_cell(column, model, model.label in best.get(column, ())) for column in columns]
            rows.append(Row((Cell(label), *cells)))
            if model.scores and model.paper:
                paper = [_paper_cell(column, model) for column in columns]
                rows.append(Row((Cell("paper (ours − paper)"), *paper), "detail"))
    return Table(("model", *(column.title for column in columns)), tuple(rows))


def _best(group: Group, columns: list[Measure]) -> dict[Measure, set[str]]:
    """Labels of the best pruned or tuned models by column, where there is a choice."""
    best = {}
    for column in columns:
        if column.kind == "recovered" or (column.kind == "task" and column.metric != "acc"):
            continue
        sign = -1 if column.kind == "perplexity" else 1
        found = {model.label: column.value(model) for model in group.models if model.role != "dense"}
        values = {label: sign * round(value, 2) for label, value in found.items() if value is not None}
        if len(set(values.values())) > 1:
            best[column] = {label for label, value in values.items() if value == max(values.values())}
    return best


def _cell(column: Measure, model: ScoredModel, is_best: bool) -> Cell:
    value, error = column.value(model), column.stderr(model)
    if value is None:
        blank = column.kind == "recovered" and model.role != "tuned"
        return Cell("" if blank else NONE)
    return Cell(number(column, value), f"± {error:.2f}" if error is not None else "", is_best)


def _paper_cell(column: Measure, model: ScoredModel) -> Cell:
    ours, theirs = column.value(model), column.paper(model)
    if theirs is None:
        return Cell("")
    if ours is None:
        return Cell(number(column, theirs))
    change = round(ours - theirs, 6)
    return Cell(number(column, theirs), f"({change:+.1f})" if column.kind == "recovered" else f"({change:+.2f})")


def number(column: Measure, value: float) -> str:
    """A value as tables have it: two digits, `%` for a share that was won back."""
    if column.kind == "recovered":
        return f"{value:.1f}%"
    return f"{value:.4g}" if abs(value) >= 1e5 else f"{value:.2f}"


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader of `results_table` must know, a Markdown paragraph each."""
    models = [model for group in groups for model in group.models]
    scored = [model for model in models if model.scores]
    columns = measures(models)
    texts = []
    if any(column.is_percent for column in columns):
        texts.append("Accuracy is in percent ± its standard error; the average's takes the tasks as independent.")
    if any(_best(group, columns) for group in groups):
        texts.append("Bold is the best of the pruned and tuned models of a group.")
    if any(column.kind == "recovered" for column in columns):
        texts.append(
            "“Recovered” is the share of the loss through pruning that tuning won back, (tuned − pruned) / (dense − "
            "pruned); of a perplexity the logarithm counts."
        )
    parts = [" ".join(texts)] if texts else []
    return parts + ([_paper_note(scored)] if any(model.paper for model in scored) else [])


def _paper_note(models: list[ScoredModel]) -> str:
    """Where the paper's rows come from, and where they are not of the same setting."""
    found = [(model, model.paper) for model in models]
    tables = sorted({row.table for _, row in found if row is not None})
    texts = [f"The paper: {SOURCE}, table{'s' if len(tables) > 1 else ''} {', '.join(map(str, tables))}."]
    for row in paper_rows():
        if row.is_misprinted and any(row == shown for _, shown in found):
            methods = " + ".join(method_name(method) for method in (row.prune, row.tune) if method)
            texts.append(
                f"It prints {row.average_printed:.2f} as the average of {row.model}, {methods}; the mean of its cells, "
                f"{row.average():.2f}, is shown."
            )
    limits = sorted({model.limit for model, row in found if row is not None and model.limit is not None})
    if limits:
        texts.append(f"Ours are of the first {', '.join(map(str, limits))} documents of each task, the paper's of all.")
    extras = sorted({name for model, row in found if row is not None for name in _beyond_the_paper(model.prune)})
    if extras:
        texts.append(f"Pruning here had settings that the paper's had not: {escape(', '.join(extras))}.")
    return " ".join(texts)


def _beyond_the_paper(prune: dict[str, Any]) -> list[str]:
    usual = {"refit": False, "reconstruct_epochs": 0, "true_sequential": None, "channel_permutation": False,
             "layer_sparsity": "uniform"}  # fmt: skip
    return [f"{name} {prune[name]}" for name, value in usual.items() if name in prune and prune[name] != value]


def model_label(role: str, prune: dict[str, Any], tune: dict[str, Any]) -> str:
    """“dense”, “SparseGPT”, “SparseGPT + LoRS”: what was done to the model.

    Args:
        role: dense, pruned or tuned.
        prune: config of the prune stage, empty when there is none.
        tune: config of the tune stage.
    """
    if role == "dense":
        return "dense"
    pruned = method_name(prune["method"]) if prune.get("method") else ""
    if role == "pruned":
        return pruned or "pruned"
    tuned = method_name(tune["method"]) if tune.get("method") else "tuned"
    return f"{pruned} + {tuned}" if pruned else tuned


def pattern_name(prune: dict[str, Any]) -> str:
    """`2:4`, or `50% unstructured`."""
    pattern = str(prune.get("pattern") or "")
    share = prune.get("sparsity")
    return f"{100 * share:g}% {pattern}" if pattern == "unstructured" and isinstance(share, (int, float)) else pattern
