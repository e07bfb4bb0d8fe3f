"""`run_recipe`: the stages in order, finished ones skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lors_cli import console, parallel, run_dir
from lors_cli.errors import ResourceError, UsageError
from lors_cli.plans import StagePlan, announce, plan_stages, resolve_data_dir, select
from lors_cli.recipe import STAGES, PruneConfig, Recipe, TuneConfig

RUN_MARKS = {"recipe.yaml", "manifest.json"}
SWEEP_MARKS = {"sweep.yaml", "sweep.json"}
STAGE_MARKS = {
    run_dir.RECORD_NAME, run_dir.WORK_NAME, run_dir.STAGING_NAME, run_dir.JOURNAL_NAME, ".pieces", ".scratch",
}  # fmt: skip
"""Names that show that a folder was made here."""


def run_single(plan: StagePlan, data_dir: Path | None) -> bool:
    """Do a stage on its own, unless it is done; whether anything was done.

    Args:
        plan: from `plan_single`.
        data_dir: local datasets.
    """
    with claim(plan.folder):
        if plan.status == "done":
            console.heading(f"{plan.stage}: finished earlier, nothing to do")
            return False
        console.heading(f"{plan.stage}: {announce(plan)}")
        run_stage(plan, data_dir)
        return True


def guard_out(out: Path, stage: str, inputs: Iterable[str] = ()) -> None:
    """Refuse to write into a folder that holds something else.

    Args:
        out: where results are to go.
        stage: prune, tune, eval, merge; or run or sweep for the folder of a whole one.
        inputs: the models that are read.

    Raises:
        UsageError: it is a file, a model that is read, another stage's result or a folder of others' files.
    """
    elsewhere = "Choose another --out."
    if not out.is_dir():
        above = next((folder for folder in (out, *out.parents) if folder.exists()), Path())
        if not above.is_dir():
            raise UsageError(f"{above} is a file; --out must be a folder.", elsewhere)
        return
    if any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise UsageError(f"--out {out} is the model's own folder; results go to another.", elsewhere)
    names = {path.name for path in out.iterdir()} - {".lock"}
    record = run_dir.read_record(out)
    if record is not None and record.stage != stage:
        raise UsageError(f"{out} holds the results of {record.stage}, which would be overwritten.", elsewhere)
    marks = {"run": RUN_MARKS, "sweep": SWEEP_MARKS}
    for kind, theirs in marks.items():
        if stage != kind and record is None and names & theirs:
            raise UsageError(f"{out} is a {kind}'s folder; a {stage}'s results go to their own.", elsewhere)
    if names and not names & marks.get(stage, STAGE_MARKS):
        raise UsageError(f"{out} holds other files; results are not mixed with them.", elsewhere)


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Hold `out` for this process; a folder made for it goes again when nothing was written there.

    Of several processes on one job the first one holds it for all.
    """
    if not parallel.is_main():
        yield
        return
    fresh = not out.exists()
    with run_dir.lock(out):
        try:
            yield
        finally:
            if fresh and [path.name for path in out.iterdir()] == [".lock"]:
                shutil.rmtree(out)


def check_disk(plan: StagePlan) -> None:
    """Refuse a stage whose results don't fit on the disk.

    Raises:
        ResourceError: naming what is free and what is needed.
    """
    from lors_cli.planning import try_estimate

    needed, _ = try_estimate(plan.config, plan.origin)
    free = free_disk(plan.folder)
    if needed is not None and needed.disk > free:
        raise ResourceError(
            f"{plan.stage} needs about {console.gib(needed.disk)} of disk in {plan.folder}; "
            f"{console.gib(free)} are free.",
            "Free some space or choose another --out; what was finished before is intact.",
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_memory(plan: StagePlan) -> None:
    """Refuse a stage that is to run and cannot fit in the memory that is free here.

    Raises:
        ResourceError: naming what is needed, what is free, and which settings would fit.
    """
    from lors_cli.planning import shortage

    found = shortage(plan.config, plan.origin) if plan.status != "done" else None
    if found is not None:
        raise ResourceError(*found)


def run_stage(plan: StagePlan, data_dir: Path | None) -> None:
    """Do one stage's work.

    Args:
        plan: from `plan_stages`.
        data_dir: local datasets.
    """
    with console.busy("starting"):
        from lors_cli.evaluation import evaluate
        from lors_cli.pruning import prune
        from lors_cli.tuning import tune

    if parallel.num_processes() > 1 and not isinstance(plan.config, PruneConfig):
        raise UsageError(
            f"{plan.stage} runs in one process, and torchrun started {parallel.num_processes()}; pruning can use them.",
            "Start this command again without torchrun: what is finished is not done again.",
        )
    check_disk(plan)
    check_memory(plan)
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
        The run's summary: stages with what was done, evaluation results, comparisons of models, paths.
    """
    from lors_cli.evaluation import compare_models
    from lors_cli.report import write_report

    if parallel.num_processes() > 1:
        raise UsageError(
            f"`lors run` runs in one process, and torchrun started {parallel.num_processes()}.",
            "Several processes can prune: torchrun --nproc-per-node N -m lors_cli prune MODEL --out DIR",
        )
    data_dir = resolve_data_dir(recipe.data_dir)
    guard_out(out, "run")
    with console.busy("looking at what is done"):
        plans = select(plan_stages(recipe, out, data_dir), first, last, force)
    with claim(out):
        _write_recipe(recipe, out)
        done = list(_run_plans(recipe, out, [plan.stage for plan in plans], data_dir, force))
        _write_manifest(recipe, out, done)
        with console.busy("writing the report"):
            finished = finished_stages(recipe, out, data_dir)
            report = write_report(out, finished)
    scores = results(out, recipe) if "eval" in finished else {}
    comparisons = compare_models(out / "eval", scores)
    return {"run": str(out), "stages": done, "results": scores, "comparisons": comparisons, "report": str(report)}


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
            console.heading(f"{label}: {announce(plan)}")
            with claim(plan.folder):  # against the same stage run on its own
                run_stage(plan, data_dir)
            console.info(f"  {stage} took {console.duration(time.monotonic() - started)}")
        yield {
            "stage": stage, "status": "skipped" if plan.status == "done" else "done", "folder": str(plan.folder),
            "fingerprint": plan.fingerprint, "elapsed_s": round(time.monotonic() - started, 2),
        }  # fmt: skip


def _find(recipe: Recipe, out: Path, stage: str, data_dir: Path | None) -> StagePlan:
    return next(plan for plan in plan_stages(recipe, out, data_dir) if plan.stage == stage)


def _write_recipe(recipe: Recipe, out: Path) -> None:
    from lors_cli.loading import dump_recipe

    text = dump_recipe(recipe)
    path = out / "recipe.yaml"
    if not path.is_file() or path.read_bytes() != text.encode():
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
        "name": recipe.name, "model": _origin(recipe),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seeds": seeds,
        "environment": run_dir.environment(), "stages": stages, "last_call": done,
    }  # fmt: skip
    run_dir.write_json(out / "manifest.json", content)


def _origin(recipe: Recipe) -> dict[str, Any]:
    """Which model the run starts from; of one on the hub the commit too."""
    from lors_cli.revisions import commit_of
    from lors_cli.sources import locate

    repo = locate(recipe.model.path).repo
    if repo is None:
        return {"path": recipe.model.path}
    revision = recipe.model.revision
    return {"path": recipe.model.path, "revision": revision, "commit": commit_of(repo, revision)}


def finished_stages(recipe: Recipe, out: Path, data_dir: Path | None) -> set[str]:
    """The stages whose results in `out` are those of this recipe.

    Args:
        recipe: the whole pipeline.
        out: run folder.
        data_dir: local datasets.
    """
    return {plan.stage for plan in plan_stages(recipe, out, data_dir) if plan.status == "done"}


def results(out: Path, recipe: Recipe) -> dict[str, Any]:
    """The evaluation results of a run by model."""
    found = {role: run_dir.read_json(out / "eval" / f"{role}.json") for role in recipe.roles()}
    return {role: content for role, content in found.items() if content is not None}
