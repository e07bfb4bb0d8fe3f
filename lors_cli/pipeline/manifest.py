"""manifest.json: where a run's results come from, and enough to repeat it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment
from lors_cli.pipeline.stages import STAGES
from lors_cli.pipeline.standing import standing_stages
from lors_cli.recipe.schema import Recipe

MANIFEST_NAME = "manifest.json"
_NOTHING: Mapping[Any, Any] = MappingProxyType({})
_OF_THE_CALL = ("model", "finished_at", "environment", "data_dir", "working_directory")
"""What is kept of an earlier manifest when a call has made none of the stages that stand."""

Entry = dict[str, Any]


def inputs(recipe: Recipe, data_dir: Path | None, known: Mapping[tuple[str, str], Entry] = _NOTHING) -> list[Entry]:
    """Every model and text that a recipe reads, in a fixed order.

    Args:
        recipe: with defaults filled in.
        data_dir: local datasets.
        known: by user and name, what is noted already of those that are not to be looked at.

    Returns:
        {"used_by", "name", "fingerprint", "revision"}: local files by the SHA-256 of their content, what is on the
        hub by name and, where it is known, by commit.
    """
    from lors_cli.data.sources import fingerprint_source
    from lors_cli.evaluation.tasks import task_fingerprint
    from lors_cli.models.sources import model_fingerprint

    found: list[Entry] = []

    def add(used_by: str, name: str, look: Callable[[], str]) -> None:
        if (used_by, name) in known:
            found.append(known[used_by, name])
            return
        fingerprint = look()
        found.append(
            {"used_by": used_by, "name": name, "fingerprint": fingerprint, "revision": hub_commit(fingerprint)}
        )

    add("model", recipe.model.path, partial(model_fingerprint, recipe.model))
    for stage, doors in STAGES.items():
        config = getattr(recipe, stage)
        if config is None:
            continue
        reads = doors.reads(config)
        for task in reads.tasks:
            add(stage, task.name, partial(task_fingerprint, task, data_dir))
        for text in reads.texts:
            add(stage, text.name, partial(fingerprint_source, text.name, split=text.split, data_dir=data_dir,
                                          columns=text.columns, chosen=text.chosen))  # fmt: skip
        if reads.teacher is not None:
            add(f"{stage}.distill", reads.teacher.path, partial(model_fingerprint, reads.teacher))
    return found


def hub_commit(fingerprint: str) -> str | None:
    """The commit of a model or dataset on the hub, None for what is no hub's, or whose commit is not known.

    Args:
        fingerprint: `hub:<repo>@<commit>:<dtype>` of a model, `hub:<repo>@<commit>/<config>/<split>` of a dataset.
    """
    pinned = re.match("hub:[^@]+@([0-9a-f]{40})[:/]", fingerprint)
    return pinned[1] if pinned else None


def write_manifest(recipe: Recipe, out: Path, done: list[Entry], data_dir: Path | None) -> None:
    """Write what lies in a run folder and where it comes from; nothing where no stage stands there yet.

    What an earlier manifest says of stages that this call has not made stays as it is, though what they read may
    have changed meanwhile.

    Args:
        recipe: of what lies there (`standing_recipe`).
        out: the run folder.
        done: what this call did, a stage an entry.
        data_dir: local datasets.
    """
    stages = [_stage_entry(out, stage, record) for stage, record in standing_stages(out).items()]
    if not stages:
        return
    old = _stored(out)
    recipe = _up_to(recipe, stages[-1]["stage"])
    kept = [entry["stage"] for entry in stages if entry in old.get("stages", [])]
    atomic.write_json(out / MANIFEST_NAME, {
        **_of_the_call(recipe, data_dir),
        **({key: old[key] for key in _OF_THE_CALL if key in old} if len(kept) == len(stages) else {}),
        "inputs": _inputs(recipe, data_dir, old, kept, stages[0]["stage"]),
        "stages": stages, "last_call": done,
    })  # fmt: skip


def has_new(out: Path) -> bool:
    """Whether a stage stands in a run folder that its manifest does not know."""
    known = _stored(out).get("stages", [])
    return any(_stage_entry(out, stage, record) not in known for stage, record in standing_stages(out).items())


def _stored(out: Path) -> Entry:
    """The manifest that is there, if it is whole."""
    found: Any = atomic.read_json(out / MANIFEST_NAME)
    return dict(found) if is_whole(found) else {}


def _inputs(recipe: Recipe, data_dir: Path | None, old: Entry, kept: list[str], first: str) -> list[Entry]:
    users = {stage: stage for stage in kept} | ({"model": first} if first in kept else {})
    known = {(entry["used_by"], entry["name"]): entry for entry in old.get("inputs", ())
             if entry["used_by"].partition(".")[0] in users}  # fmt: skip
    return inputs(recipe, data_dir, known)


def _up_to(recipe: Recipe, last: str) -> Recipe:
    """A recipe without the stages after `last`."""
    from lors_cli.recipe.schema import STAGES

    return replace(recipe, **dict.fromkeys(STAGES[STAGES.index(last) + 1 :]))  # type: ignore[arg-type]


def _of_the_call(recipe: Recipe, data_dir: Path | None) -> Entry:
    """What a call that made a stage says of all of them."""
    from lors_cli.recipe.loading import recipe_values

    seeds = {"recipe": recipe.seed}
    if recipe.prune:
        seeds["calibration"] = recipe.prune.calibration.seed
    if recipe.tune:
        seeds["tune"] = recipe.tune.seed
    return {
        "name": recipe.name, "model": _origin(recipe),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seeds": seeds,
        "environment": environment.environment(), "recipe": recipe_values(recipe),
        "data_dir": str(data_dir) if data_dir else None, "working_directory": str(Path.cwd()),
    }  # fmt: skip


def _origin(recipe: Recipe) -> Entry:
    """Which model the run starts from; of one on the hub the commit too."""
    from lors_cli.files.revisions import commit_of
    from lors_cli.models.sources import locate

    repo = locate(recipe.model.path).repo
    if repo is None:
        return {"path": recipe.model.path}
    revision = recipe.model.revision
    return {"path": recipe.model.path, "revision": revision, "commit": commit_of(repo, revision)}


def _stage_entry(out: Path, stage: str, record: records.StageRecord) -> Entry:
    return {
        "stage": stage, "fingerprint": record.fingerprint, "elapsed_s": record.elapsed_s,
        "environment": record.environment, "results": results(out, stage),
    }  # fmt: skip


def is_whole(content: Any) -> bool:
    """Whether a manifest has all that a repeat needs."""
    parts: dict[str, dict[str, Any]] = {
        "inputs": {"used_by": str, "name": str, "fingerprint": str, "revision": (str, type(None))},
        "stages": {"stage": str, "environment": dict, "results": dict},
    }  # fmt: skip
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        return False
    return all(
        isinstance(content.get(part), list)
        and content[part]
        and all(isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in keys.items())
                for entry in content[part])
        for part, keys in parts.items()
    )  # fmt: skip


def results(out: Path, stage: str) -> dict[str, str]:
    """SHA-256 of a stage's weights, or of its scores (tasks and perplexities, not the models' paths).

    Args:
        out: the run folder.
        stage: a finished one.
    """
    record = records.read_record(out / stage)
    assert record is not None
    if stage != "eval":
        return {name: digest for name, digest in record.files.items() if name.endswith(".safetensors")}
    contents = {name: atomic.read_json(out / stage / name) for name in sorted(record.files)}
    return {name: hashes.fingerprint("scores", 1, None, {**content, "model": None})
            for name, content in contents.items() if content is not None}  # fmt: skip
