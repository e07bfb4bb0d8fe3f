"""`run_recipe`: the stages in order, finished ones skipped."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lors_cli import console, run_dir
from lors_cli.errors import MissingError, ResourceError, UsageError
from lors_cli.recipe import STAGES, EvalConfig, ModelConfig, PruneConfig, Recipe, TuneConfig

DATA_DIR_VARIABLE = "LORS_DATA_DIR"


@dataclass(frozen=True)
class StagePlan:
    """A stage and what is known of it before it runs.

    Args:
        stage: prune, tune or eval.
        folder: where its results go.
        config: its settings.
        models: the models it reads, by role.
        origin: the dense model, whose sizes all of them share.
        fingerprint: of its result.
        status: done, resume (begun earlier), or run.
        detail: for people.
    """

    stage: str
    folder: Path
    config: PruneConfig | TuneConfig | EvalConfig
    models: dict[str, ModelConfig]
    origin: ModelConfig
    fingerprint: str
    status: str
    detail: str


def resolve_data_dir(name: str | None) -> Path | None:
    """The folder with local datasets: `name`, else $LORS_DATA_DIR, else None for the hub.

    Raises:
        MissingError: it is no folder.
    """
    chosen = name or os.environ.get(DATA_DIR_VARIABLE)
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        source = "data_dir" if name else f"${DATA_DIR_VARIABLE}"
        raise MissingError(f"{source}: {folder} is no folder.", "It should look like the layout in the README.")
    return folder


def plan_stages(recipe: Recipe, out: Path, data_dir: Path | None) -> list[StagePlan]:
    """What a run of this recipe would do; no weights are loaded, nothing is written.

    Args:
        recipe: the whole pipeline.
        out: run folder.
        data_dir: local datasets.
    """
    from lors_cli import pruning, tuning
    from lors_cli.evaluation import check_tasks
    from lors_cli.models import model_fingerprint

    models = {"dense": recipe.model}
    fingerprints = {"dense": model_fingerprint(recipe.model)}
    current = "dense"
    plans = []
    if recipe.eval is not None:
        check_tasks(recipe.eval.tasks, data_dir)
    if recipe.prune is not None:
        fingerprint = pruning.stage_fingerprint(recipe.prune, fingerprints[current], data_dir)
        plans.append(_plan("prune", out / "prune", recipe.prune, {current: models[current]}, recipe.model, fingerprint))
        current = _chain("pruned", "prune", out, recipe, fingerprint, models, fingerprints)
    if recipe.tune is not None:
        fingerprint = tuning.stage_fingerprint(recipe.tune, fingerprints[current], data_dir)
        plans.append(_plan("tune", out / "tune", recipe.tune, {current: models[current]}, recipe.model, fingerprint))
        _chain("tuned", "tune", out, recipe, fingerprint, models, fingerprints)
    if recipe.eval is not None:
        plans.append(_plan_eval(recipe.eval, out / "eval", models, fingerprints, data_dir))
    return plans


def _chain(
    role: str, stage: str, out: Path, recipe: Recipe, fingerprint: str,
    models: dict[str, ModelConfig], fingerprints: dict[str, str],
) -> str:  # fmt: skip
    """Note the model that a stage will leave, under the fingerprint it will answer with."""
    models[role] = replace(recipe.model, path=str(out / stage), revision="main")
    fingerprints[role] = f"{stage}:{fingerprint}:{recipe.model.dtype}"
    return role


def _plan(
    stage: str, folder: Path, config: Any, models: dict[str, ModelConfig], origin: ModelConfig, fingerprint: str
) -> StagePlan:  # fmt: skip
    if run_dir.is_finished(folder, fingerprint):
        status, detail = "done", "finished earlier"
    elif run_dir.read_json(folder / run_dir.WORK_NAME / "fingerprint.json") == fingerprint:
        status, detail = "resume", "begun earlier, goes on from there"
    elif run_dir.read_record(folder) is not None:
        status, detail = "run", "its settings or its input changed"
    else:
        status, detail = "run", "not done yet"
    return StagePlan(stage, folder, config, models, origin, fingerprint, status, detail)


def plan_single(stage: str, config: Any, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> StagePlan:
    """The plan of a stage on its own, whose folder is `out`.

    Args:
        stage: prune, tune or eval.
        config: its settings.
        models: one model, or for eval several by label.
        out: the stage folder.
        data_dir: local datasets.
    """
    from lors_cli import pruning, tuning
    from lors_cli.evaluation import check_tasks
    from lors_cli.models import model_fingerprint

    fingerprints = {label: model_fingerprint(model) for label, model in models.items()}
    if stage == "eval":
        check_tasks(config.tasks, data_dir)
        return _plan_eval(config, out, models, fingerprints, data_dir)
    (base,) = fingerprints.values()
    module = pruning if stage == "prune" else tuning
    return _plan(
        stage, out, config, models, next(iter(models.values())), module.stage_fingerprint(config, base, data_dir)
    )


def run_single(plan: StagePlan, data_dir: Path | None) -> bool:
    """Do a stage on its own, unless it is done; whether anything was done.

    Args:
        plan: from `plan_single`.
        data_dir: local datasets.
    """
    for model in plan.models.values():
        if Path(model.path).exists() and plan.folder.exists() and plan.folder.samefile(model.path):
            raise UsageError(f"--out {plan.folder} is the model's own folder; results go to another.")
    guard_out(plan.folder, (run_dir.RECORD_NAME, run_dir.WORK_NAME, run_dir.STAGING_NAME, ".pieces", ".lock"))
    with run_dir.lock(plan.folder):
        if plan.status == "done":
            console.heading(f"{plan.stage}: finished earlier, nothing to do")
            return False
        console.heading(f"{plan.stage}: {describe(plan)}")
        run_stage(plan, data_dir)
        return True


def _plan_eval(
    config: EvalConfig, folder: Path, models: dict[str, ModelConfig], fingerprints: dict[str, str],
    data_dir: Path | None,
) -> StagePlan:  # fmt: skip
    from lors_cli.evaluation import eval_fingerprint, pending_pieces

    chosen = {role: model for role, model in models.items() if config.models is None or role in config.models}
    known = {role: fingerprints[role] for role in chosen}
    fingerprint = eval_fingerprint(config, known, data_dir)
    pending = pending_pieces(config, known, folder, data_dir)
    total = len(chosen) * (len(config.tasks) + len(config.perplexity))
    if not pending and run_dir.is_finished(folder, fingerprint):
        return StagePlan(
            "eval", folder, config, chosen, next(iter(models.values())), fingerprint, "done", "finished earlier"
        )
    status = "resume" if len(pending) < total else "run"
    detail = f"{len(pending)} of {total} measurements to do"
    return StagePlan("eval", folder, config, chosen, next(iter(models.values())), fingerprint, status, detail)


def select(plans: list[StagePlan], first: str | None, last: str | None) -> list[StagePlan]:
    """The stages from `first` to `last`.

    Raises:
        UsageError: the recipe lacks one of them, or a stage before `first` is not finished.
    """
    names = [plan.stage for plan in plans]
    for flag, stage in (("--from", first), ("--until", last)):
        if stage is not None and stage not in names:
            raise UsageError(f"{flag} {stage}: this recipe has only {', '.join(names)}.")
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    if start >= end:
        raise UsageError(f"--from {first} comes after --until {last}.")
    unfinished = [plan.stage for plan in plans[:start] if plan.status != "done"]
    if unfinished:
        raise UsageError(f"--from {first}: {unfinished[0]} is not finished with these settings.", "Leave --from out.")
    return plans[start:end]


def guard_out(out: Path, marks: tuple[str, ...]) -> None:
    """Refuse to write into a folder that holds something else.

    Args:
        out: where results are to go.
        marks: names that show it was made by us.

    Raises:
        UsageError: it is a file, or a folder of others' files.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out must be a folder.")
    if out.is_dir() and any(out.iterdir()) and not any((out / mark).exists() for mark in marks):
        raise UsageError(f"{out} holds other files; results are not mixed with them.", "Choose another --out.")


def check_disk(plan: StagePlan) -> None:
    """Refuse a stage whose results don't fit on the disk.

    Raises:
        ResourceError: naming what is free and what is needed.
    """
    from lors_cli.planning import try_estimate

    needed, _ = try_estimate(plan.config, plan.origin)
    parent = plan.folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed is not None and needed.disk > free:
        raise ResourceError(
            f"{plan.stage} needs about {console.gib(needed.disk)} of disk in {plan.folder}; "
            f"{console.gib(free)} are free.",
            "Free some space or choose another --out; what was finished before is intact.",
        )


def run_stage(plan: StagePlan, data_dir: Path | None) -> None:
    """Do one stage's work.

    Args:
        plan: from `plan_stages`.
        data_dir: local datasets.
    """
    from lors_cli.evaluation import evaluate
    from lors_cli.pruning import prune
    from lors_cli.tuning import tune

    check_disk(plan)
    if isinstance(plan.config, PruneConfig):
        prune(plan.config, next(iter(plan.models.values())), plan.folder, data_dir=data_dir)
    elif isinstance(plan.config, TuneConfig):
        tune(plan.config, next(iter(plan.models.values())), plan.folder, data_dir=data_dir)
    else:
        evaluate(plan.config, plan.models, plan.folder, data_dir=data_dir)


def forget(plan: StagePlan) -> None:
    """Make a finished or begun stage undone, for --force."""
    (plan.folder / run_dir.RECORD_NAME).unlink(missing_ok=True)
    for name in (run_dir.WORK_NAME, run_dir.STAGING_NAME, "checkpoints", ".pieces"):
        shutil.rmtree(plan.folder / name, ignore_errors=True)


def run_recipe(
    recipe: Recipe, out: Path, *, first: str | None = None, last: str | None = None, force: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run a recipe's stages in order; finished ones are skipped, begun ones go on.

    Args:
        recipe: the whole pipeline.
        out: run folder.
        first: start here; what comes before must be finished.
        last: stop after this stage.
        force: stages to do again though they are finished.

    Returns:
        The run's summary: stages with what was done, evaluation results, paths.
    """
    data_dir = resolve_data_dir(recipe.data_dir)
    guard_out(out, ("recipe.yaml", "manifest.json", ".lock"))
    plans = select(plan_stages(recipe, out, data_dir), first, last)
    odd = [stage for stage in force if stage not in [plan.stage for plan in plans]]
    if odd:
        raise UsageError(f"--force {odd[0]}: that stage is not among {', '.join(plan.stage for plan in plans)}.")
    with run_dir.lock(out):
        _write_recipe(recipe, out)
        done = list(_run_plans(recipe, out, [plan.stage for plan in plans], data_dir, force))
        _write_manifest(recipe, out, done)
        report = _write_report(out)
    return {"run": str(out), "stages": done, "results": results(out, recipe), "report": str(report)}


def _run_plans(
    recipe: Recipe, out: Path, stages: list[str], data_dir: Path | None, force: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(stages, 1):
        plan = _find(recipe, out, stage, data_dir)
        if stage in force:
            forget(plan)
            plan = _find(recipe, out, stage, data_dir)
        started = time.monotonic()
        label = f"[{number}/{len(stages)}] {stage}"
        if plan.status == "done":
            console.heading(f"{label}: {plan.detail}")
        else:
            console.heading(f"{label}: {describe(plan)}")
            run_stage(plan, data_dir)
            console.info(f"  {stage} took {console.duration(time.monotonic() - started)}")
        yield {
            "stage": stage, "status": "skipped" if plan.status == "done" else "done", "folder": str(plan.folder),
            "fingerprint": plan.fingerprint, "elapsed_s": round(time.monotonic() - started, 2),
        }  # fmt: skip


def _find(recipe: Recipe, out: Path, stage: str, data_dir: Path | None) -> StagePlan:
    return next(plan for plan in plan_stages(recipe, out, data_dir) if plan.stage == stage)


def describe(plan: StagePlan) -> str:
    """One line on what a stage does."""
    config = plan.config
    if isinstance(config, PruneConfig):
        share = f" {config.sparsity:g}" if config.pattern == "unstructured" else ""
        return f"{config.method} {config.pattern}{share} ({plan.detail})"
    if isinstance(config, TuneConfig):
        length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epochs"
        return f"{config.method} rank {config.rank} on {config.data.dataset}, {length} ({plan.detail})"
    return f"{', '.join(plan.models)}: {', '.join((*config.tasks, *config.perplexity))} ({plan.detail})"


def _write_recipe(recipe: Recipe, out: Path) -> None:
    from lors_cli.loading import dump_recipe

    text = dump_recipe(recipe)
    path = out / "recipe.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        run_dir.write_text(path, text)


def _write_manifest(recipe: Recipe, out: Path, done: list[dict[str, Any]]) -> None:
    seeds = {"recipe": recipe.seed}
    if recipe.prune:
        seeds["calibration"] = recipe.prune.calibration.seed
    if recipe.tune:
        seeds["tune"] = recipe.tune.seed
    stages = []
    for stage in STAGES:
        record = run_dir.read_record(out / stage)
        if record is not None:
            stages.append({"stage": stage, "fingerprint": record.fingerprint, "elapsed_s": record.elapsed_s})
    content = {
        "name": recipe.name, "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seeds": seeds,
        "environment": run_dir.environment(), "stages": stages, "last_call": done,
    }  # fmt: skip
    run_dir.write_json(out / "manifest.json", content)


def _write_report(out: Path) -> Path:
    from lors_cli.report import write_report

    return write_report(out)


def results(out: Path, recipe: Recipe) -> dict[str, Any]:
    """The evaluation results of a run by model; empty before eval is finished."""
    found = {role: run_dir.read_json(out / "eval" / f"{role}.json") for role in recipe.roles()}
    return {role: content for role, content in found.items() if content is not None}
