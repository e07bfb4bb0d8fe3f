"""What lies in a run folder: the stages that stand there, and the recipe that they were made by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.files.records import StageRecord
from lors_cli.models.sources import is_known_as
from lors_cli.output import console
from lors_cli.recipe.loading import load_recipe, stage_config
from lors_cli.recipe.resolved import resolved_recipe
from lors_cli.recipe.schema import STAGES, Recipe

RECIPE_NAME = "recipe.yaml"
_MAKERS = {"pruned": "prune", "tuned": "tune"}


def standing_stages(out: Path) -> dict[str, StageRecord]:
    """The stages whose results are in a run folder whole, made from one another, whatever a recipe now asks for.

    Args:
        out: the run folder.
    """
    found: dict[str, StageRecord] = {}
    for stage in STAGES:
        record = records.read_record(out / stage)
        if record is None or not records.is_finished(out / stage, record.fingerprint):
            continue
        if stage == "tune" and "prune" in found and not _is_made_from(record, out / "prune", found["prune"]):
            if not _is_from_elsewhere(record, out / "prune"):
                continue  # what it was made from has been replaced
            del found["prune"]  # another recipe's, which tuned a model that it did not prune
        if stage == "pack" and not _is_packed_from(record, found, out):
            continue
        if stage == "eval" and not _is_of(record, found, out):
            continue
        found[stage] = record
    return found


def _is_made_from(made: StageRecord, folder: Path, model: StageRecord) -> bool:
    return is_known_as(made.inputs.get("model"), folder, model)


def _is_packed_from(packed: StageRecord, found: Mapping[str, StageRecord], out: Path) -> bool:
    """Whether it was made from the last model that stands there, or from one elsewhere where there is none."""
    last = next((stage for stage in ("tune", "prune") if stage in found), None)
    if last is None:
        return Path(str(packed.inputs.get("path"))).parent.absolute() != out.absolute()
    return _is_made_from(packed, out / last, found[last])


def _is_from_elsewhere(tuned: StageRecord, folder: Path) -> bool:
    """Whether it was made from a model that is still there and is not the one in `folder`."""
    path = Path(str(tuned.inputs.get("path")))
    return path.exists() and not path.samefile(folder)


def _is_of(scores: StageRecord, found: Mapping[str, StageRecord], out: Path) -> bool:
    """Whether the models that were scored are those that stand there; one that was removed may have been."""
    if not scores.inputs.keys() <= {"dense", *_MAKERS}:
        return False  # of `lors eval`, which names its models otherwise
    first = found.get("prune") or (None if "pruned" in scores.inputs else found.get("tune"))
    if first is not None and scores.inputs.get("dense", first.inputs.get("model")) != first.inputs.get("model"):
        return False
    return all(
        is_known_as(scores.inputs[role], out / stage, found[stage])
        for role, stage in _MAKERS.items()
        if role in scores.inputs and stage in found
    )


def stored_recipe(out: Path) -> Recipe | None:
    """What `recipe.yaml` says, None where it is absent or broken."""
    if not (out / RECIPE_NAME).is_file():
        return None
    try:
        return load_recipe(out / RECIPE_NAME)
    except UsageError as error:
        console.warn(f"{out / RECIPE_NAME} cannot be read and is written anew: {error.message}")
        return None


def standing_recipe(asked: Recipe, out: Path, *, has_new: bool, begins: bool) -> Recipe:
    """The settings of what lies in a run folder, stage by stage; of what does not lie there those it was begun with.

    Args:
        asked: what this call is to do.
        out: the run folder.
        has_new: whether this call has made one of the stages that stand there; else model, seed and the rest of what
            stages share stay as they are too.
        begins: whether it is about to begin a stage.
    """
    standing, stored = standing_stages(out), stored_recipe(out)
    head = stored if stored is not None and standing and not has_new else asked
    last = max((STAGES.index(stage) for stage in standing), default=-1)
    sections: dict[str, Any] = {}
    for place, stage in enumerate(STAGES):
        source = stored if stored is not None and (place < last or not (begins or has_new)) else asked
        sections[stage] = getattr(source, stage)
        if stage in standing:
            try:
                sections[stage] = stage_config(stage, standing[stage].config)
            except UsageError as error:
                console.warn(f"{out / stage} was made with settings that this version cannot read: {error.message}")
    try:
        return resolved_recipe(replace(head, **sections))
    except ValueError:  # scores of a model that was removed, and of which no recipe is left
        return resolved_recipe(asked)
