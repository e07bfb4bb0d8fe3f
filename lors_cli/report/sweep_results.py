"""What a sweep left on disk, read for its report and brought into groups that compare.

A sweep's folder: `sweep.json` names its cells with their status, their stage folders and one eval folder a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError
from lors_cli.evaluation.summary import recovered
from lors_cli.files import atomic
from lors_cli.files import records as run_dir
from lors_cli.models.sources import short_name
from lors_cli.report.comparison import model_label, pattern_name
from lors_cli.report.measures import Group, ScoredModel
from lors_cli.report.results import ROLES, read_log

INDEX_NAME = "sweep.json"
_IN_TITLES = ("model.path", "prune.method", "prune.pattern", "prune.sparsity", "tune.method")
"""Settings that labels and titles say anyway."""


@dataclass(frozen=True)
class Scores:
    """One model's eval folder, once it is finished."""

    folder: str
    content: dict[str, Any] | None = None
    record: run_dir.StageRecord | None = None


@dataclass(frozen=True)
class SweepCell:
    """One run of a sweep; what is not there yet is empty."""

    name: str
    recipe: str
    settings: dict[str, Any]
    """Overrides of the recipe, by dotted key."""
    values: dict[str, Any]
    """Those of them that vary in the sweep."""
    status: str
    error: str | None
    folders: dict[str, str]
    """Stage to folder, relative to the sweep."""
    records: dict[str, run_dir.StageRecord]
    scores: dict[str, Scores]
    log: list[dict[str, Any]]

    def config(self, stage: str) -> dict[str, Any]:
        """The stage's settings: all of them once it is finished, before that those that the sweep overrides."""
        if stage in self.records:
            return self.records[stage].config
        known = {key[len(stage) + 1 :]: value for key, value in self.settings.items() if key.startswith(f"{stage}.")}
        return {"method": None, **known} if stage in self.folders else known

    def evaluated(self) -> dict[str, dict[str, Any]]:
        """Scores of the models that are finished."""
        return {role: found.content for role, found in self.scores.items() if found.content is not None}


@dataclass
class SweepResults:
    """A whole sweep."""

    folder: Path
    name: str
    axes: dict[str, list[Any]] = field(default_factory=dict)
    text: str = ""
    """Of sweep.yaml."""
    cells: list[SweepCell] = field(default_factory=list)


def read_sweep(folder: Path) -> SweepResults:
    """Everything that a report may show.

    Args:
        folder: a sweep's folder; cells may be pending or failed.

    Raises:
        UsageError: `sweep.json` is not the index of a sweep.
    """
    index = atomic.read_json(folder / INDEX_NAME)
    index = index if isinstance(index, dict) else {}
    cells = index.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and cell.get("name") for cell in cells):
        raise UsageError(f"{folder / INDEX_NAME} is not the index of a sweep.", "lors sweep writes it; run it again.")
    text = folder / "sweep.yaml"
    return SweepResults(
        folder,
        str(index.get("name") or folder.resolve().name),
        index.get("axes") or {},
        text.read_text(encoding="utf-8", errors="replace") if text.is_file() else "",
        [_read_cell(folder, cell) for cell in cells],
    )


def _read_cell(folder: Path, cell: dict[str, Any]) -> SweepCell:
    folders = cell.get("stages") or {}
    records = {stage: run_dir.read_record(folder / path) for stage, path in folders.items()}
    models = cell.get("models") or {}
    values = cell.get("values") or {}
    return SweepCell(
        name=str(cell.get("name")),
        recipe=str(cell.get("recipe") or ""),
        settings={**(cell.get("overrides") or {}), **values},
        values=values,
        status=str(cell.get("status") or "pending"),
        error=cell.get("error"),
        folders=folders,
        records={stage: record for stage, record in records.items() if record is not None},
        scores={role: _read_scores(folder, models[role], role) for role in ROLES if role in models},
        log=read_log(folder / folders["tune"] / "log.jsonl") if "tune" in folders else [],
    )


def _read_scores(folder: Path, path: str, role: str) -> Scores:
    record = run_dir.read_record(folder / path)
    content = atomic.read_json(folder / path / f"{role}.json") if record is not None else None
    return Scores(path, content if isinstance(content, dict) else None, record)


def stage_seconds(cell: SweepCell) -> dict[str, float]:
    """What a cell's stages took; those that it shares with others count in full."""
    seconds = {stage: record.elapsed_s for stage, record in cell.records.items()}
    evals = [scores.record.elapsed_s for scores in cell.scores.values() if scores.record is not None]
    return {**seconds, "eval": math.fsum(evals)} if evals else seconds


def groups(sweep: SweepResults) -> list[Group]:
    """The sweep's models, each once: every dense model, then what each pruning of it became.

    Args:
        sweep: as read.
    """
    bases = _bases(sweep)
    by_base: dict[str, dict[str, list[SweepCell]]] = {}
    for cell in sweep.cells:
        origins = by_base.setdefault(bases[cell.name], {})
        origins.setdefault(cell.folders.get("prune", ""), []).append(cell)
    found = []
    for base, origins in by_base.items():
        cells = [cell for members in origins.values() for cell in members]
        dense = _models("dense", base, cells)
        title = short_name(base)
        if dense:
            found.append(Group(title, tuple(dense)))
        for members in origins.values():
            models = [*_models("pruned", base, members), *_models("tuned", base, members)]
            if models:
                found.append(Group(_title(title if len(by_base) > 1 else "", members), tuple(models)))
    return [Group(group.title, _told_apart(group.models)) for group in found]


def _bases(sweep: SweepResults) -> dict[str, str]:
    """Cell to the path of the dense model it starts from; a pending cell has that of its recipe."""
    known = {cell.name: _base(cell) for cell in sweep.cells}
    of_recipe = {cell.recipe: known[cell.name] for cell in reversed(sweep.cells) if known[cell.name]}
    return {cell.name: known[cell.name] or of_recipe.get(cell.recipe) or cell.recipe for cell in sweep.cells}


def _base(cell: SweepCell) -> str | None:
    first = cell.records.get("prune") or (cell.records.get("tune") if "prune" not in cell.folders else None)
    if first is not None and first.inputs.get("path"):
        return str(first.inputs["path"])
    dense = cell.evaluated().get("dense")
    return str(dense["model"]) if dense and dense.get("model") else cell.settings.get("model.path")


def _title(base: str, members: list[SweepCell]) -> str:
    """What a group's models share: dense model, pruner, pattern."""
    prune = members[0].config("prune")
    words = [model_label("pruned", prune, {}) if "prune" in members[0].folders else "not pruned", pattern_name(prune)]
    return ", ".join(filter(None, [base, " ".join(filter(None, words))]))


def _models(role: str, base: str, cells: list[SweepCell]) -> list[ScoredModel]:
    """The models of one role that the cells have, each once."""
    owners: dict[str, list[SweepCell]] = {}
    for cell in cells:
        if role in cell.scores:
            owners.setdefault(cell.scores[role].folder, []).append(cell)
        elif role == _last_role(cell):
            owners.setdefault(f"cell {cell.name}", []).append(cell)
    return [_model(role, base, members) for members in owners.values()]


def _last_role(cell: SweepCell) -> str:
    return "tuned" if "tune" in cell.folders or not cell.folders else "pruned"


def _model(role: str, base: str, cells: list[SweepCell]) -> ScoredModel:
    cell = cells[0]
    scores = cell.scores.get(role) or Scores("")
    prune = cell.config("prune") if role != "dense" else {}
    tune = cell.config("tune") if role == "tuned" else {}
    settings = _common_settings(role, cells)
    label = model_label(role, prune, tune)
    evaluated = cell.evaluated()
    stage = {"pruned": "prune", "tuned": "tune"}.get(role, "")
    return ScoredModel(
        role=role,
        label=f"{label} ({', '.join(_spoken(settings))})" if settings else label,
        base=base,
        cells=tuple(other.name for other in cells),
        settings=settings,
        prune=prune,
        tune=tune,
        status="done" if scores.content is not None else _status(cells),
        error=cell.error if scores.content is None else None,
        scores=scores.content,
        shares=recovered(evaluated) if role == "tuned" else {},
        limit=scores.record.config.get("limit") if scores.record else None,
        made=cell.records.get(stage),
        eval_s=scores.record.elapsed_s if scores.record else None,
    )


def _status(cells: list[SweepCell]) -> str:
    """Of a model without scores."""
    statuses = {cell.status for cell in cells}
    if len(statuses) == 1:
        return "not evaluated" if statuses == {"done"} else statuses.pop()
    return "running" if "running" in statuses else "pending"


def _common_settings(role: str, cells: Iterable[SweepCell]) -> dict[str, Any]:
    """What the sweep varies and these cells share, as far as it can matter to a model of this role."""
    other_stages = {"dense": ("prune.", "tune."), "pruned": ("tune.",), "tuned": ()}[role]
    shared: dict[str, Any] | None = None
    for cell in cells:
        mine = {key: value for key, value in cell.values.items() if key not in _IN_TITLES}
        shared = mine if shared is None else {key: shared[key] for key in shared if mine.get(key) == shared[key]}
    return {key: value for key, value in (shared or {}).items() if not key.startswith(other_stages)}


def _spoken(settings: dict[str, Any]) -> list[str]:
    """`rank 32`; the whole key where two end alike."""
    ends = Counter(key.rpartition(".")[2] for key in settings)
    words = []
    for key, value in settings.items():
        end = key.rpartition(".")[2]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"{end if ends[end] == 1 else key} {text}")
    return words


def _told_apart(models: tuple[ScoredModel, ...]) -> tuple[ScoredModel, ...]:
    """Labels that several models of a group have get the cells' names."""
    counts = Counter(model.label for model in models)
    return tuple(
        replace(model, label=f"{model.label} [{', '.join(model.cells)}]") if counts[model.label] > 1 else model
        for model in models
    )
