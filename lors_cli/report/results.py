"""What a run or a sweep left on disk, read for its report: a run is a sweep of one cell."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.files import records as run_dir
from lors_cli.recipe.loading import read_settings
from lors_cli.recipe.schema import STAGES
from lors_cli.report.measures import finite

ROLES = ("dense", "pruned", "tuned")
INDEX_NAME = "sweep.json"
"""Names a sweep's cells with their status, their stage folders and one eval folder a model."""


@dataclass(frozen=True)
class Scores:
    """One model's scores, `content` as in its eval/*.json; None while it is not evaluated."""

    folder: str
    content: dict[str, Any] | None = None
    limit: int | None = None
    """Documents a task at most."""
    elapsed_s: float | None = None
    """None where the evaluation was of several models."""


@dataclass(frozen=True)
class Cell:
    """One run; what is not there yet is empty."""

    name: str
    base: str | None
    """Path of the dense model, None where no stage nor setting says it."""
    folders: dict[str, str]
    """Stage to folder, relative to the run or sweep."""
    records: dict[str, run_dir.StageRecord]
    scores: dict[str, Scores]
    """In the order of `ROLES`."""
    log: list[dict[str, Any]]
    recipe: str = ""
    """Its name in the sweep."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Overrides of the recipe, by dotted key."""
    values: dict[str, Any] = field(default_factory=dict)
    """Those of them that vary in the sweep."""
    status: str = "done"
    error: str | None = None

    def config(self, stage: str) -> dict[str, Any]:
        """The stage's settings: all of them once it is finished, before that those that the sweep overrides."""
        if stage in self.records:
            return self.records[stage].config
        known = {key[len(stage) + 1 :]: value for key, value in self.settings.items() if key.startswith(f"{stage}.")}
        return {"method": None, **known} if stage in self.folders else known

    def evaluated(self) -> dict[str, dict[str, Any]]:
        """Scores of the models that are finished."""
        return {role: found.content for role, found in self.scores.items() if found.content is not None}

    def seconds(self) -> dict[str, float]:
        """What its stages took; those that it shares with others count in full."""
        seconds = {stage: record.elapsed_s for stage, record in self.records.items()}
        evals = [scores.elapsed_s for scores in self.scores.values() if scores.elapsed_s is not None]
        return {**seconds, "eval": math.fsum(evals)} if evals else seconds


@dataclass(frozen=True)
class Results:
    """A whole sweep, or a run as its only cell; `text` is of sweep.yaml or recipe.yaml."""

    name: str
    text: str
    cells: list[Cell]
    axes: dict[str, list[Any]] = field(default_factory=dict)


def read_run(folder: Path, finished: Collection[str] | None = None) -> Results:
    """A run's results; of the `finished` stages alone unless that is None."""
    path = folder / "recipe.yaml"
    recipe = read_settings(path).data if path.is_file() else {}
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    stages = [stage for stage in STAGES if finished is None or stage in finished]
    records = {stage: record for stage in stages if (record := run_dir.read_record(folder / stage)) is not None}
    limit = records["eval"].config.get("limit") if "eval" in records else None
    read = {role: atomic.read_json(folder / "eval" / f"{role}.json") for role in ROLES if "eval" in stages}
    contents = {role: content for role, content in read.items() if isinstance(content, dict)}
    folders = {stage: stage for stage in records}
    base = (recipe.get("model") or {}).get("path") or _origin(folders, records)
    name = str(recipe.get("name") or folder.resolve().name)
    cell = Cell(
        name, base or next((content.get("model") for content in contents.values()), None), folders, records,
        {role: Scores("eval", content, limit) for role, content in contents.items()},
        read_log(folder / "tune" / "log.jsonl") if "tune" in stages else [],
    )  # fmt: skip
    return Results(name, text, [cell])


def read_sweep(folder: Path) -> Results:
    """A sweep's results; cells may be pending or failed. Raises UsageError where `sweep.json` is not its index."""
    index = atomic.read_json(folder / INDEX_NAME)
    index = index if isinstance(index, dict) else {}
    cells = index.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and cell.get("name") for cell in cells):
        raise UsageError(f"{folder / INDEX_NAME} is not the index of a sweep.", "lors sweep writes it; run it again.")
    path = folder / "sweep.yaml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    name = str(index.get("name") or folder.resolve().name)
    return Results(name, text, [_read_cell(folder, cell) for cell in cells], index.get("axes") or {})


def _read_cell(folder: Path, cell: dict[str, Any]) -> Cell:
    folders, models, values = cell.get("stages") or {}, cell.get("models") or {}, cell.get("values") or {}
    found = {stage: run_dir.read_record(folder / path) for stage, path in folders.items()}
    records = {stage: record for stage, record in found.items() if record is not None}
    scores = {role: _read_scores(folder, models[role], role) for role in ROLES if role in models}
    settings = {**(cell.get("overrides") or {}), **values}
    dense = scores["dense"].content if "dense" in scores else None
    return Cell(
        str(cell["name"]), _origin(folders, records) or (dense or {}).get("model") or settings.get("model.path"),
        folders, records, scores, read_log(folder / folders["tune"] / "log.jsonl") if "tune" in folders else [],
        str(cell.get("recipe") or ""), settings, values, str(cell.get("status") or "pending"), cell.get("error"),
    )  # fmt: skip


def _read_scores(folder: Path, path: str, role: str) -> Scores:
    record = run_dir.read_record(folder / path)
    if record is None:
        return Scores(path)
    content = atomic.read_json(folder / path / f"{role}.json")
    return Scores(path, content if isinstance(content, dict) else None, record.config.get("limit"), record.elapsed_s)


def _origin(folders: dict[str, str], records: dict[str, run_dir.StageRecord]) -> str | None:
    """What the first stage was given."""
    first = records.get("prune") or (None if "prune" in folders else records.get("tune"))
    return first.inputs.get("path") if first else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl` that have a finite loss, by step; a last line that a kill has torn is left out."""
    if not path.is_file():
        return []
    by_step = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and finite(row.get("loss")) is not None:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]
