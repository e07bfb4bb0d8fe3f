"""The models that a run or a sweep made, each once, labelled, and brought into groups that compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lors_cli.evaluation.summary import recovered
from lors_cli.models.sources import short_name
from lors_cli.report.colours import coloured
from lors_cli.report.measures import Group, ScoredModel
from lors_cli.report.paper import METHODS
from lors_cli.report.results import ROLES, Cell, Results, Scores

_IN_TITLES = ("model.path", "prune.method", "prune.pattern", "prune.sparsity", "tune.method")
"""Settings that labels and titles say anyway."""
_MAKERS = {"dense": (), "pruned": ("prune",), "tuned": ("tune", "merge")}


def run_group(run: Results) -> Group:
    """The models of a run or of a stage that were scored, together; where none was, those that were made."""
    found = [model for group in groups(run) for model in group.models]
    models = [model for model in found if model.scores] or [model for model in found if model.made or model.packed]
    title = short_name(models[0].base) if models and models[0].role else run.name
    return coloured([Group(title, tuple(models))])[0]


def groups(results: Results) -> list[Group]:
    """Every dense model, then what each pruning of it became; what earlier settings made is apart."""
    known = {cell.recipe: cell.base for cell in reversed(results.cells) if cell.base}
    by_base: dict[str, dict[str, list[Cell]]] = {}
    for cell in results.cells:
        base = str(cell.base or known.get(cell.recipe) or cell.recipe)
        by_base.setdefault(base, {}).setdefault(cell.folders.get("prune", ""), []).append(cell)
    named = [model for cell in results.cells for model in _named(cell)]
    found = [Group(results.name, tuple(named))] if named else []
    for base, origins in by_base.items():
        title = short_name(base)
        found.append(Group(title, _models("dense", base, [cell for cells in origins.values() for cell in cells])))
        for cells in origins.values():
            name = _title(title if len(by_base) > 1 else "", cells[0])
            for earlier, its_name in ((False, name), (True, f"{name}, earlier settings")):
                models = [model for role in ("pruned", "tuned") for model in _models(role, base, cells, earlier)]
                found.append(Group(its_name, tuple(models)))
    return coloured(_told_apart([group for group in found if group.models]))


def _named(cell: Cell) -> list[ScoredModel]:
    """The models that `lors eval` was given names for."""
    return [
        ScoredModel("", name, str((scores.content or {}).get("model")), cells=(cell.name,), scores=scores.content,
                    limit=scores.limit, folder=scores.folder, chance=scores.chance)
        for name, scores in cell.scores.items()
        if name not in ROLES
    ]  # fmt: skip


def _title(base: str, cell: Cell) -> str:
    """What a group's models share: dense model, pruner, pattern."""
    prune = cell.config("prune")
    words = [model_label("pruned", prune, {}) if "prune" in cell.folders else "not pruned", pattern_name(prune)]
    return ", ".join(filter(None, [base, " ".join(filter(None, words))]))


def _models(role: str, base: str, cells: Sequence[Cell], earlier: bool | None = None) -> tuple[ScoredModel, ...]:
    """The models of one role that the cells have, each once; one that is yet to come belongs to its cell.

    Args:
        earlier: those of earlier settings, or those of the last ones, alone.
    """
    owners: dict[str, list[Cell]] = {}
    for cell in cells:
        last = _last_role(cell)
        if role in cell.scores:
            owners.setdefault(cell.scores[role].folder, []).append(cell)
        elif role == last:
            owners.setdefault(f"cell {cell.name}", []).append(cell)
    chosen = [members for members in owners.values() if earlier in (None, _are_earlier(members))]
    return tuple(_model(role, base, members) for members in chosen)


def _are_earlier(cells: Sequence[Cell]) -> bool:
    """Whether no cell of the last settings has the model that these have."""
    return all(cell.unfinished for cell in cells)


def _last_role(cell: Cell) -> str:
    """Of the last model that a cell's stages make, which is the one that is packed; empty where they make none."""
    if {"tune", "merge"} & set(cell.folders) or not cell.folders:
        return "tuned"
    return "pruned" if {"prune", "pack"} & set(cell.folders) else ""


def _model(role: str, base: str, cells: list[Cell]) -> ScoredModel:
    cell = cells[0]
    scores = cell.scores.get(role) or Scores("")
    is_scored = scores.content is not None
    prune = cell.config("prune") if role != "dense" else {}
    tune = cell.config("tune") if role == "tuned" else {}
    label, settings = model_label(role, prune, tune), _common_settings(role, cells)
    words = _spoken(settings) + ["earlier settings"] * _are_earlier(cells)
    made = [cell.records[stage] for stage in _MAKERS[role] if stage in cell.records]
    return ScoredModel(
        role, f"{label} ({', '.join(words)})" if words else label, base,
        cells=tuple(other.name for other in cells), settings=settings, prune=prune, tune=tune,
        status="done" if is_scored else _status(cells), error=None if is_scored else cell.error,
        scores=scores.content, shares=recovered(cell.evaluated()) if role == "tuned" else {}, limit=scores.limit,
        made=next(iter(made), None), eval_s=scores.elapsed_s, chance=scores.chance,
        folder=scores.folder, packed=cell.records.get("pack") if role == _last_role(cell) else None,
    )  # fmt: skip


def _status(cells: Sequence[Cell]) -> str:
    """Of a model without scores."""
    statuses = {cell.status for cell in cells}
    if len(statuses) == 1:
        return "not evaluated" if statuses == {"done"} else statuses.pop()
    return "running" if "running" in statuses else "pending"


def _common_settings(role: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the sweep varies and these cells share, as far as it can matter to a model of this role."""
    foreign = {"dense": ("prune.", "tune."), "pruned": ("tune.",), "tuned": ()}[role]
    return {
        key: value
        for key, value in cells[0].values.items()
        if key not in _IN_TITLES and not key.startswith(foreign) and all(c.values.get(key) == value for c in cells)
    }


def _spoken(settings: dict[str, Any]) -> list[str]:
    """`rank 32`; the whole key where two end alike."""
    ends = Counter(key.rpartition(".")[2] for key in settings)
    words = []
    for key, value in settings.items():
        end = key.rpartition(".")[2]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"{end if ends[end] == 1 else key} {text}")
    return words


def _told_apart(found: Sequence[Group]) -> list[Group]:
    """Labels that several groups have get a mark; what is then still named alike gets the cells' names."""
    counts = Counter(label for group in found for label in {model.label for model in group.models})
    has_one_base = len({model.base for group in found for model in group.models}) == 1

    def marked(model: ScoredModel) -> ScoredModel:
        words = ["" if has_one_base else short_name(model.base), pattern_name(model.prune)]
        return replace(model, mark=", ".join(filter(None, words))) if counts[model.label] > 1 else model

    found = _each(found, marked)
    names = Counter(model.name for group in found for model in group.models)
    return _each(found, lambda model: replace(model, label=f"{model.label} [{', '.join(model.cells)}]")
                 if names[model.name] > 1 else model)  # fmt: skip


def _each(found: Sequence[Group], change: Callable[[ScoredModel], ScoredModel]) -> list[Group]:
    return [replace(group, models=tuple(map(change, group.models))) for group in found]


def model_label(role: str, prune: dict[str, Any], tune: dict[str, Any]) -> str:
    """“dense”, “SparseGPT”, “SparseGPT + LoRS”: what was done to the model, by its stages' configs (empty: none)."""
    if role == "dense":
        return "dense"
    pruned, tuned = (str(stage.get("method") or "") for stage in (prune, tune))
    pruned, tuned = METHODS.get(pruned, pruned), METHODS.get(tuned, tuned)
    if role == "pruned":
        return pruned or "pruned"
    return " + ".join(filter(None, [pruned, tuned or "tuned"]))


def pattern_name(prune: dict[str, Any]) -> str:
    """`2:4`, or `50% unstructured`."""
    pattern = str(prune.get("pattern") or "")
    share = prune.get("sparsity")
    return f"{100 * share:g}% {pattern}" if pattern == "unstructured" and isinstance(share, (int, float)) else pattern
