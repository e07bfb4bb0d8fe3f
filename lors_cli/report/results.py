"""What a run left on disk, read for its report."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.files import atomic
from lors_cli.files import records as run_dir
from lors_cli.models.sources import short_name
from lors_cli.recipe.schema import STAGES
from lors_cli.report.measures import Group, ScoredModel

ROLES = ("dense", "pruned", "tuned")


@dataclass
class RunResults:
    """A run's recipe, finished stages, scores and training log; what is absent is empty."""

    run: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    records: dict[str, run_dir.StageRecord] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)


def read_run(run: Path, finished: Collection[str] | None = None) -> RunResults:
    """Everything that a report may show.

    Args:
        run: a run folder (DESIGN §4).
        finished: the stages to read; None for all.

    Returns:
        The results; scores are in the order dense, pruned, tuned.
    """
    results = RunResults(run)
    path = run / "recipe.yaml"
    if path.is_file():
        results.recipe_text, results.recipe = _read_recipe(path)
    for stage in STAGES:
        record = run_dir.read_record(run / stage)
        if record is not None and (finished is None or stage in finished):
            results.records[stage] = record
    for role in ROLES if finished is None or "eval" in finished else ():
        content = atomic.read_json(run / "eval" / f"{role}.json")
        if isinstance(content, dict):
            results.scores[role] = content
    if finished is None or "tune" in finished:
        results.log = read_log(run / "tune" / "log.jsonl")
    return results


def models(results: RunResults) -> Group:
    """The run's models, as a sweep of one cell would have them.

    Args:
        results: of the run; a model that was not scored is left out.
    """
    from lors_cli.evaluation.summary import recovered
    from lors_cli.report.comparison import model_label

    configs = {stage: record.config for stage, record in results.records.items()}
    prune, tune = configs.get("prune", {}), configs.get("tune", {})
    origin = results.records.get("prune") or results.records.get("tune")
    base = (results.recipe.get("model") or {}).get("path") or (origin.inputs.get("path") if origin else None)
    found = []
    for role, scores in results.scores.items():
        found.append(ScoredModel(
            role=role, label=model_label(role, prune, tune), base=str(base or scores.get("model") or ""),
            cells=(str(results.recipe.get("name") or results.run.resolve().name),),
            prune=prune if role != "dense" else {}, tune=tune if role == "tuned" else {}, scores=scores,
            shares=recovered(results.scores) if role == "tuned" else {},
            limit=configs.get("eval", {}).get("limit"),
            made=results.records.get({"pruned": "prune", "tuned": "tune"}.get(role, "")),
        ))  # fmt: skip
    return Group(short_name(found[0].base) if found else "", tuple(found))


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    from lors_cli.errors import UsageError
    from lors_cli.recipe.yaml12 import YamlError, read

    try:
        text = path.read_text(encoding="utf-8")
        data = read(text).data
    except YamlError as error:
        raise UsageError(f"{path}:{error.line}: {error.message}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None
    return text, data if isinstance(data, dict) else {}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The training log's whole lines; a last line that a kill has torn is left out.

    Args:
        path: `log.jsonl`, one JSON object an optimiser step; it may be absent.

    Returns:
        The lines that have a step and a finite loss, in order of steps.
    """
    if not path.is_file():
        return []
    by_step = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and _is_finite(row.get("loss")):
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
