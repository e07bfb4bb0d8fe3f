"""What a run or a sweep left on disk, read for its report: a run is a sweep of one cell."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lors_cli.errors import UsageError
from lors_cli.evaluation.plain_results import finite
from lors_cli.files import atomic
from lors_cli.files import records as run_dir
from lors_cli.recipe.loading import read_settings, without_none
from lors_cli.recipe.schema import STAGES
from lors_cli.report.chance import chance_levels
from lors_cli.tuning.training.step_log import StepLog

ROLES = ("dense", "pruned", "tuned")
INDEX_NAME = "sweep.json"
"""Names a sweep's cells with their status, their stage folders and one eval folder a model."""
UNFINISHED = "unfinished"
"""Of a cell that earlier settings have finished: the same with the last ones, which have not."""


@dataclass(frozen=True)
class Scores:
    """One model's scores, `content` as in its eval/*.json; None while it is not evaluated."""

    folder: str
    content: dict[str, Any] | None = None
    limit: int | None = None
    """Documents a task at most."""
    elapsed_s: float | None = None
    """None where the evaluation was of several models."""
    chance: dict[str, float] = field(default_factory=dict)
    """Task to the accuracy of guessing, where it is known."""


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
    """By role, in the order of `ROLES`, or by the names that `lors eval` was given, in its order."""
    log: list[dict[str, Any]]
    """Rows with a training loss."""
    recipe: str = ""
    """Its name in the sweep."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Overrides of the recipe, by dotted key."""
    values: dict[str, Any] = field(default_factory=dict)
    """Those of them that vary in the sweep."""
    status: str = "done"
    error: str | None = None
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the log with a `val_loss`."""
    unfinished: Cell | None = None
    """The same cell with the sweep's last settings; this one is of earlier ones."""

    @property
    def label(self) -> str:
        """Its name, and whether its results are of earlier settings."""
        return f"{self.name} (earlier settings)" if self.unfinished else self.name

    def config(self, stage: str) -> dict[str, Any]:
        """The stage's settings: all of them once it is finished, before that those that the sweep overrides."""
        if stage in self.records:
            return self.records[stage].config
        if stage == "tune" and "merge" in self.records:  # which knows the adapter, not how it was trained
            return self.records["merge"].metrics.get("adapter") or {}
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


def read_run(folder: Path, finished: Collection[str]) -> Results:
    """A run's results, of the `finished` stages alone."""
    path = folder / "recipe.yaml"
    recipe = read_settings(path).data if path.is_file() else {}
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    stages = [stage for stage in STAGES if stage in finished]
    records = {stage: record for stage in stages if (record := run_dir.read_record(folder / stage)) is not None}
    limit = records["eval"].config.get("limit") if "eval" in records else None
    read = {role: atomic.read_json(folder / "eval" / f"{role}.json") for role in ROLES if "eval" in stages}
    contents = {role: content for role, content in read.items() if isinstance(content, dict)}
    folders = {stage: stage for stage in records}
    base = (recipe.get("model") or {}).get("path") or _origin(folders, records)
    name = str(recipe.get("name") or folder.resolve().name)
    chance = chance_levels(folder / "eval", contents)
    log = folder / "tune" / "log.jsonl" if "tune" in stages else None
    cell = Cell(
        name, base or next((content.get("model") for content in contents.values()), None), folders, records,
        {role: Scores("eval", content, limit, chance=chance) for role, content in contents.items()},
        read_log(log), held_out=read_log(log, "val_loss"),
    )  # fmt: skip
    return Results(name, text, [cell])


def read_stage(folder: Path) -> Results:
    """The results of a single stage, as `lors prune`, `tune`, `merge`, `pack` and `eval` write them to --out.

    Raises:
        UsageError: its record is broken, or the scores are no longer those that were measured.
    """
    record = run_dir.read_record(folder)
    if record is None:
        raise UsageError(f"{folder / run_dir.RECORD_NAME} is not the record of a stage.", "Run the stage again.")
    name, contents = folder.resolve().name, dict[str, dict[str, Any]]()
    if record.stage == "eval":
        read = {label: atomic.read_json(folder / f"{label}.json") for label in record.inputs}
        contents = {label: content for label, content in read.items() if isinstance(content, dict)}
        if len(contents) < len(read) or not run_dir.is_finished(folder, record.fingerprint):
            raise UsageError(f"The scores in {folder} have been changed since they were measured.",
                             "Run lors eval again with the same --out: what is missing is measured.")  # fmt: skip
    chance = chance_levels(folder, contents)
    scores = {
        label: Scores(".", content, record.config.get("limit"), chance=chance) for label, content in contents.items()
    }
    log = folder / "log.jsonl" if record.stage == "tune" else None
    cell = Cell(
        name, record.inputs.get("path") or next((content["model"] for content in contents.values()), None),
        {record.stage: "."}, {record.stage: record}, scores, read_log(log), held_out=read_log(log, "val_loss"),
    )  # fmt: skip
    text = yaml.safe_dump(without_none(record.config), sort_keys=False, allow_unicode=True) if record.config else ""
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
    log = folder / folders["tune"] / "log.jsonl" if "tune" in folders else None
    return Cell(
        str(cell["name"]), _origin(folders, records) or (dense or {}).get("model") or settings.get("model.path"),
        folders, records, scores, read_log(log), str(cell.get("recipe") or ""), settings, values,
        str(cell.get("status") or "pending"), cell.get("error"), read_log(log, "val_loss"),
        _read_cell(folder, cell[UNFINISHED]) if UNFINISHED in cell else None,
    )  # fmt: skip


def _read_scores(folder: Path, path: str, role: str) -> Scores:
    record = run_dir.read_record(folder / path)
    if record is None:
        return Scores(path)
    content = atomic.read_json(folder / path / f"{role}.json")
    content = content if isinstance(content, dict) else None
    chance = chance_levels(folder / path, {role: content} if content else {})
    return Scores(path, content, record.config.get("limit"), record.elapsed_s, chance)


def _origin(folders: dict[str, str], records: dict[str, run_dir.StageRecord]) -> str | None:
    """What the first stage was given."""
    first = records.get("prune") or (None if "prune" in folders else records.get("tune"))
    return first.inputs.get("path") if first else None


def read_log(path: Path | None, key: str = "loss") -> list[dict[str, Any]]:
    """The rows of a `log.jsonl` that have a finite `key`; what is no row of the trainer's is left out."""
    rows = StepLog(path).rows() if path else []
    return [row for row in rows if finite(row.get(key)) is not None]
