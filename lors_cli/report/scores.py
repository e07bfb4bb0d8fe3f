"""The table of scores: by task (a run, the terminal), by model in the layout of the LoRS paper's tables, by cell."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lors_cli.evaluation.summary import LOST_IN_ERROR, recovered
from lors_cli.output.markdown import NONE, Cell, Row, Table, escape
from lors_cli.report.measures import Group, Measure, ScoredModel, measures
from lors_cli.report.paper import METHODS, SOURCE, paper_rows
from lors_cli.report.results import ROLES

JOINS = {
    "wikitext2": "Perplexity of wikitext2 is of all rows of the hub's table joined by two newlines, as in papers "
    "(a copy in a data folder may lack blank rows, and then differs).",
    "wikitext2-lines": "Perplexity of wikitext2-lines is of WikiText-2's non-blank lines joined by one newline, not of "
    "the papers' text.",
}
"""What text WikiText-2's perplexity is of, by name."""
INSIDE_ERROR = "—"
"""In place of a share of what was lost, where the loss is no larger than its own error."""
UNLIKE = "Not of the same tasks, documents, examples or windows of text in all rows, so that not all of them compare"
Key = TypeVar("Key", bound=Hashable)


def number(column: Measure, value: float, digits: int = 2) -> str:
    """A value as tables have it: two digits, `digits` of what is no percentage, `%` for a share that was won back."""
    if column.kind == "recovered":
        return f"{value:.1f}%"
    if column.is_percent:
        return f"{value:.2f}"
    return f"{value:.4g}" if abs(value) >= 1e5 else f"{value:.{digits}f}"


def _best(column: Measure, values: Mapping[Key, float]) -> set[Key]:
    """Where the best of the values stand."""
    best = min(values.values()) if column.kind == "perplexity" else max(values.values())
    return {key for key, value in values.items() if value == best}


# By task --------------------------------------------------------------------------------------------------------


def by_task(results: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row a task and text: accuracies in percent with their standard error, then perplexities.

    Behind each model but the first stands its difference to `dense` (or, where there is none, to the first), and
    last the share that tuning recovered. Other metrics of a task with an acc are in the rows below it.

    Returns:
        Column titles and rows of text, for `console.table`.
    """
    models = [ScoredModel(label, label, "", scores=content) for label, content in results.items()]
    base = next((model for model in models if model.label == "dense"), models[0])
    shares = recovered(dict(results))
    columns = ["task"]
    for model in models:
        columns += [model.label] if model is base else [model.label, f"Δ {base.label}"]
    rows, depths = [], _depths(results)
    items = measures(models, every_metric=True, subtasks=True, first=())
    for item in items:
        row = ["  " * depths.get(item.name, 0) + _row_title(item, below_acc=replace(item, metric="acc") in items)]
        for model in models:
            row += [_with_error(item, model)] if model is base else [_with_error(item, model), _gap(item, model, base)]
        if shares:
            name = "accuracy" if item.kind == "average" else row[0]
            row.append(share_text(shares[name]) if item.kind != "task" and name in shares else "")
        rows.append(row)
    return [*columns, "recovered"] if shares else columns, rows


def _depths(results: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """How many groups a task or group is in."""
    depths: dict[str, int] = {}
    for content in results.values():
        for group, members in (content.get("groups") or {}).items():  # a group stands before those in it
            depths.update(dict.fromkeys(members, depths.get(group, 0) + 1))
    return depths


def share_text(share: float | None) -> str:
    """`66.7%`, or “—” for a share of a loss inside its own error."""
    return INSIDE_ERROR if share is None else f"{share:.1%}"


def _row_title(item: Measure, *, below_acc: bool) -> str:
    if item.kind == "task":
        name = item.name + item.shots
        return name if item.metric == "acc" else f"  {item.metric}" if below_acc else f"{name} {item.metric}"
    return "average acc" if item.kind == "average" else f"perplexity {item.name}"


def _with_error(item: Measure, model: ScoredModel) -> str:
    value, error = item.value(model), item.stderr(model) if item.kind == "task" and item.is_percent else None
    return NONE if value is None else number(item, value, 3) + (f" ± {error:.2f}" if error is not None else "")


def _gap(item: Measure, model: ScoredModel, base: ScoredModel) -> str:
    value, other = item.stored(model), item.stored(base)
    if value is None or other is None:
        return NONE
    text = number(item, item.scale * (value - other), 3)
    return text if text.startswith("-") else f"+{text}"


# By cell --------------------------------------------------------------------------------------------------------


def by_cell(cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]], set[tuple[int, int]], str]:
    """A row a cell (as in `sweep.json`, with its `results`): average, perplexities, recovered shares of its last model.

    Returns:
        Column titles, rows of text, (row, column) of each column's best values, and what was not measured alike.
    """
    models = [_last(cell) for cell in cells]
    found = [item for item in measures(models) if item.kind in ("perplexity", "recovered")]
    shown = [Measure("average", "accuracy"), *found]
    has_one_text = sum(item.kind == "perplexity" for item in found) == 1
    titles = ["cell", "average acc"]
    for item in found:
        titles.append("recovered ppl" if has_one_text and item.title.startswith("recovered ppl ") else item.title)
    rows = [[model.label, *(_cell_text(item, model) for item in shown)] for model in models]
    bold = set()
    for place, item in enumerate(shown, 1):
        values = {row: value for row, model in enumerate(models) if (value := item.value(model)) is not None}
        bold |= {(row, place) for row in _best(item, values)} if len(values) > 1 and item.is_alike(models) else set()
    return titles, rows, bold, _unlike(shown, models)


def _unlike(columns: Sequence[Measure], models: Sequence[ScoredModel]) -> str:
    """Which columns have numbers that do not compare; empty where all do."""
    titles = ", ".join(column.title for column in columns if not column.is_alike(models))
    return f"{UNLIKE}: {titles}." if titles else ""


def _cell_text(item: Measure, model: ScoredModel) -> str:
    value, error = item.value(model), item.stderr(model)
    if value is None:
        return _without_value(item, model)
    return number(item, value, 3).replace("%", " %") + (f" ±{error:.1f}" if error is not None else "")


def _without_value(item: Measure, model: ScoredModel) -> str:
    return INSIDE_ERROR if item.kind == "recovered" and item.name in model.shares else NONE


def _last(cell: dict[str, Any]) -> ScoredModel:
    """The last model that a finished cell makes; one without scores for other cells."""
    if cell["status"] != "done":
        return ScoredModel("", f"{cell['name']} ({cell['status']})", "")
    role = next((role for role in reversed(ROLES) if role in cell["models"]), "")
    scores = cell["results"].get(role)
    return ScoredModel(role, cell["name"], "", scores=scores, shares=recovered(cell["results"]) if scores else {})


# By model -------------------------------------------------------------------------------------------------------


def by_model(groups: Sequence[Group]) -> Table:
    """A row a model; below it the paper's row, where it has one, with ours minus the paper's.

    The best pruned or tuned model of each group is marked.
    """
    columns = measures(model for group in groups for model in group.models)
    rows = []
    for group in groups:
        best = _best_of(group, columns)
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


def _best_of(group: Group, columns: Sequence[Measure]) -> dict[Measure, set[str]]:
    """Labels of the best pruned or tuned models by column, where they compare and the digits shown differ."""
    best = {}
    models = [model for model in group.models if model.role in ("pruned", "tuned")]
    for column in columns:
        if column.kind == "recovered" or (column.kind == "task" and column.metric != "acc"):
            continue
        if not column.is_alike(models):
            continue
        found = {model.label: column.value(model) for model in models}
        values = {label: round(value, 2) for label, value in found.items() if value is not None}
        if len(set(values.values())) > 1:
            best[column] = _best(column, values)
    return best


def _cell(column: Measure, model: ScoredModel, is_best: bool) -> Cell:
    value, error = column.value(model), column.stderr(model)
    if value is None:
        return Cell("" if column.kind == "recovered" and model.role != "tuned" else _without_value(column, model))
    return Cell(number(column, value), f"± {error:.2f}" if error is not None else "", is_best)


def _paper_cell(column: Measure, model: ScoredModel) -> Cell:
    ours, theirs = column.value(model), column.paper(model)
    if theirs is None:
        return Cell("")
    if ours is None:
        return Cell(number(column, theirs))
    return Cell(number(column, theirs), f"({round(ours - theirs, 6):+.{1 if column.kind == 'recovered' else 2}f})")


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader of `by_model` must know, a Markdown paragraph each."""
    models = [model for group in groups for model in group.models]
    scored = [model for model in models if model.scores]
    columns = measures(models)
    texts = []
    if any(column.is_percent for column in columns):
        texts.append("Accuracy is in percent ± its standard error; the average's takes the tasks as independent.")
    if any(_best_of(group, columns) for group in groups):
        texts.append("Bold is the best of the pruned and tuned models of a group.")
    if unlike := _unlike(columns, models):
        texts.append(escape(unlike))
    if any(column.kind == "recovered" for column in columns):
        texts.append(
            "“Recovered” is the share of the loss through pruning that tuning won back, (tuned − pruned) / (dense − "
            "pruned); of a perplexity the logarithm counts."
        )
    texts += [JOINS[column.name] for column in columns if column.kind == "perplexity" and column.name in JOINS]
    if any(None in model.shares.values() for model in models):
        texts.append(LOST_IN_ERROR)
    parts = [" ".join(texts)] if texts else []
    return parts + ([_paper_note(scored)] if any(model.paper for model in scored) else [])


def _paper_note(models: Sequence[ScoredModel]) -> str:
    """Where the paper's rows come from, and where they are not of the same setting."""
    found = [(model, row) for model in models if (row := model.paper) is not None]
    tables = sorted({row.table for _, row in found})
    texts = [f"The paper: {SOURCE}, table{'s' if len(tables) > 1 else ''} {', '.join(map(str, tables))}."]
    for row in paper_rows():
        if row.is_misprinted and any(row == shown for _, shown in found):
            methods = " + ".join(METHODS.get(method, method) for method in (row.prune, row.tune) if method)
            texts.append(
                f"It prints {row.average_printed:.2f} as the average of {row.model}, {methods}; the mean of its cells, "
                f"{row.average():.2f}, is shown."
            )
    limits = sorted({model.limit for model, _ in found if model.limit is not None})
    if limits:
        parts = [f"{limit:g} documents" if limit >= 1 else f"{100 * limit:g} % of the documents" for limit in limits]
        texts.append(f"Ours are of the first {', '.join(parts)} of each task, the paper's of all.")
    extras = sorted({name for model, _ in found for name in _beyond_the_paper(model.prune)})
    if extras:
        texts.append(f"Pruning here had settings that the paper's had not: {escape(', '.join(extras))}.")
    more = sorted({name for model, _ in found for name in _MORE_TUNING if model.tune.get(name)})
    if more:
        texts.append(f"Tuning here had settings that the paper's had not: {escape(', '.join(more))}.")
    if any(model.tune.get("gradient", "approximate") != "approximate" for model, _ in found):
        texts.append("LoRS's gradients had the mask in them here (gradient), the paper's leave it out.")
    return " ".join(texts)


_MORE_TUNING = ("distill", "train_norms", "quantization_aware", "skip")


def _beyond_the_paper(prune: dict[str, Any]) -> list[str]:
    usual: dict[str, Any] = {"refit": False, "reconstruct_epochs": 0, "true_sequential": None,
                             "channel_permutation": False, "layer_sparsity": "uniform", "skip": []}  # fmt: skip
    if prune.get("true_sequential") is (prune.get("method") == "admm"):  # what the method implies
        prune = {**prune, "true_sequential": None}
    found = [f"{name} {prune[name]}" for name, value in usual.items() if name in prune and prune[name] != value]
    grid = prune.get("quantize")
    return [*found, f"weights of {grid['bits']} bits"] if grid else found
