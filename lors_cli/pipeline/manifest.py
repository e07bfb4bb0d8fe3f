"""manifest.json: where a run's results come from, and enough to repeat it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment
from lors_cli.recipe.schema import ColumnsConfig, Recipe

MANIFEST_NAME = "manifest.json"


def inputs(recipe: Recipe, data_dir: Path | None) -> list[dict[str, Any]]:
    """Every model and text that a recipe reads, in a fixed order.

    Args:
        recipe: with defaults filled in.
        data_dir: local datasets.

    Returns:
        {"used_by", "name", "fingerprint", "revision"}: local files by the SHA-256 of their content, what is on the
        hub by name and, once it is in this machine's cache, by commit.
    """
    from lors_cli.data.sources import Split, fingerprint_source
    from lors_cli.evaluation.tasks import task_fingerprint
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.pruning.facts import statistics_kind
    from lors_cli.tuning.teacher import teacher_model

    found: list[dict[str, Any]] = []

    def add(used_by: str, name: str, fingerprint: str) -> None:
        found.append(
            {"used_by": used_by, "name": name, "fingerprint": fingerprint, "revision": hub_commit(fingerprint)}
        )

    def text(used_by: str, name: str, split: Split, columns: ColumnsConfig | None = None) -> None:
        add(used_by, name, fingerprint_source(name, split=split, data_dir=data_dir, columns=columns))

    add("model", recipe.model.path, model_fingerprint(recipe.model))
    if recipe.prune and statistics_kind(recipe.prune) != "none":
        text("prune", recipe.prune.calibration.dataset, "train", recipe.prune.calibration.columns)
    if recipe.tune:
        text("tune", recipe.tune.data.dataset, "train", recipe.tune.data.columns)
        if recipe.tune.distill and recipe.tune.distill.teacher:
            add("tune.distill", recipe.tune.distill.teacher, model_fingerprint(teacher_model(recipe.tune.distill)))
    if recipe.eval:
        for name in recipe.eval.tasks:
            add("eval", name, task_fingerprint(name, data_dir))
        for name in recipe.eval.perplexity:
            text("eval", name, "validation")
    return found


def hub_commit(fingerprint: str) -> str | None:
    """The commit that this machine's hub cache has of a model or dataset, None for what is no hub's or not cached.

    Args:
        fingerprint: `hub:<repo>@<revision>:<dtype>` of a model, `hub:<owner>/<name>/<config>/<split>` of a dataset.
    """
    kind, _, place = fingerprint.partition(":")
    if kind != "hub":
        return None
    from lors_cli.models.revisions import cache_folder, cached_reference

    repo, at, rest = place.partition("@")
    revision = rest.rpartition(":")[0] if at else "main"
    repo = repo if at else "/".join(repo.split("/")[:2])
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = cache_folder("model" if at else "dataset", repo)
    found = cached_reference(folder, revision)
    if found is not None:
        return found
    if (folder / "snapshots" / revision).is_dir():
        return revision
    snapshots = list((folder / "snapshots").glob("*"))
    return snapshots[0].name if len(snapshots) == 1 else None


def write_manifest(recipe: Recipe, out: Path, done: list[dict[str, Any]], data_dir: Path | None) -> None:
    """Write where the results in `out` come from; `done` is what this call did."""
    seeds = {"recipe": recipe.seed}
    if recipe.prune:
        seeds["calibration"] = recipe.prune.calibration.seed
    if recipe.tune:
        seeds["tune"] = recipe.tune.seed
    content = {
        "name": recipe.name, "model": _origin(recipe),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seeds": seeds,
        "environment": environment.environment(), **manifest_content(recipe, out, data_dir), "last_call": done,
    }  # fmt: skip
    atomic.write_json(out / MANIFEST_NAME, content)


def _origin(recipe: Recipe) -> dict[str, Any]:
    """Which model the run starts from; of one on the hub the commit too."""
    from lors_cli.models.revisions import commit_of
    from lors_cli.models.sources import locate

    repo = locate(recipe.model.path).repo
    if repo is None:
        return {"path": recipe.model.path}
    revision = recipe.model.revision
    return {"path": recipe.model.path, "revision": revision, "commit": commit_of(repo, revision)}


def manifest_content(recipe: Recipe, out: Path, data_dir: Path | None) -> dict[str, Any]:
    """What a manifest must hold for a repeat.

    Args:
        recipe: the whole pipeline.
        out: its run folder.
        data_dir: local datasets.
    """
    from lors_cli.recipe.loading import recipe_values
    from lors_cli.recipe.schema import STAGES

    stages = []
    for stage in STAGES:
        record = records.read_record(out / stage)
        if record is not None:
            stages.append({
                "stage": stage, "fingerprint": record.fingerprint, "elapsed_s": record.elapsed_s,
                "environment": record.environment, "results": results(out, stage),
            })  # fmt: skip
    return {
        "recipe": recipe_values(recipe.with_defaults()), "data_dir": str(data_dir) if data_dir else None,
        "working_directory": str(Path.cwd()), "inputs": inputs(recipe.with_defaults(), data_dir), "stages": stages,
    }  # fmt: skip


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
