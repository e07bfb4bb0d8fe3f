"""`run_recipe`: the stages in order, finished ones skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lors_cli.data.sources import resolve_data_dir
from lors_cli.errors import MissingError, ResourceError, UsageError
from lors_cli.files import atomic, locks, records
from lors_cli.machine import environment, processes
from lors_cli.machine.determinism import determinism
from lors_cli.output import console, progress
from lors_cli.plans import StagePlan, announce, plan_stages, select
from lors_cli.recipe.schema import PruneConfig, Recipe, TuneConfig

RUN_MARKS = {"recipe.yaml", "manifest.json"}
SWEEP_MARKS = {"sweep.yaml", "sweep.json"}
STAGE_MARKS = {
    records.RECORD_NAME, records.WORK_NAME, records.STAGING_NAME, records.JOURNAL_NAME, ".pieces", ".scratch",
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
            if processes.is_main():
                atomic.remove(records.leftovers(plan.folder))
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
    names = {path.name for path in out.iterdir() if not atomic.is_partial(path)} - {locks.LOCK_NAME}
    record = records.read_record(out)
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
    if not processes.is_main():
        yield
        return
    fresh = not out.exists()
    with locks.hold(out):
        try:
            yield
        finally:
            if fresh and out.is_dir() and [path.name for path in out.iterdir()] == [locks.LOCK_NAME]:
                shutil.rmtree(out)


def tidy(folder: Path) -> None:
    """Remove what a killed process left beside a finished stage's results.

    Args:
        folder: the stage's.
    """
    if processes.is_main() and records.leftovers(folder):
        with claim(folder):
            atomic.remove(records.leftovers(folder))


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
    with progress.busy("starting"):
        from lors_cli.evaluation import evaluate
        from lors_cli.pruning.stage import prune
        from lors_cli.tuning.stage import tune

    check_disk(plan)
    check_memory(plan)
    with _told_when_gone(plan):
        if isinstance(plan.config, PruneConfig):
            prune(plan.config, next(iter(plan.models.values())), plan.folder, data_dir=data_dir)
        elif isinstance(plan.config, TuneConfig):
            tune(plan.config, next(iter(plan.models.values())), plan.folder, data_dir=data_dir)
        else:
            evaluate(plan.config, plan.models, plan.folder, data_dir=data_dir)


@contextmanager
def _told_when_gone(plan: StagePlan) -> Iterator[None]:
    """A folder that something else removes or renames under a running stage is no bug of ours.

    Raises:
        MissingError: naming what is gone.
    """
    folders = [plan.folder, *(Path(model.path) for model in plan.models.values())]
    there = [folder for folder in folders if folder.is_dir()]
    try:
        yield
    except FileNotFoundError as error:
        gone = next((folder for folder in there if not folder.is_dir()), None)
        if gone is None and error.filename and Path(error.filename).is_relative_to(plan.folder):
            gone = Path(error.filename)
        if gone is None:
            raise
        raise MissingError(
            f"{gone} was removed while {plan.stage} was running.",
            "The same command goes on from what is left; two runs must not share a folder.",
        ) from error


def forget(plan: StagePlan) -> None:
    """Make a finished or begun stage undone, for --force."""
    (plan.folder / records.RECORD_NAME).unlink(missing_ok=True)
    for name in (records.WORK_NAME, records.STAGING_NAME, "checkpoints", ".pieces"):
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
    data_dir = resolve_data_dir(recipe.data_dir)

    def stages_to_do() -> list[str]:
        guard_out(out, "run")
        with progress.busy("looking at what is done"):
            return [plan.stage for plan in select(plan_stages(recipe, out, data_dir), first, last, force)]

    with processes.joined():
        stages = processes.from_main(stages_to_do)
        with claim(out):
            processes.from_main(lambda: _write_recipe(recipe, out))
            with determinism(recipe.deterministic):
                done = list(_run_plans(recipe, out, stages, data_dir, force))
            return processes.from_main(lambda: _finish(recipe, out, data_dir, done))


def _finish(recipe: Recipe, out: Path, data_dir: Path | None, done: list[dict[str, Any]]) -> dict[str, Any]:
    """Write manifest and report; the run's summary."""
    from lors_cli.evaluation.significance import compare_models
    from lors_cli.report import write_report

    _write_manifest(recipe, out, done, data_dir)
    with progress.busy("writing the report"):
        finished = finished_stages(recipe, out, data_dir)
        report = write_report(out, finished)
    scores = results(out, recipe) if "eval" in finished else {}
    comparisons = compare_models(out / "eval", scores)
    return {"run": str(out), "stages": done, "results": scores, "comparisons": comparisons, "report": str(report)}


def _run_plans(
    recipe: Recipe, out: Path, stages: list[str], data_dir: Path | None, force: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(stages, 1):
        plan = processes.from_main(lambda: _find(recipe, out, stage, data_dir, stage in force))  # noqa: B023
        started = time.monotonic()
        label = f"[{number}/{len(stages)}] {stage}"
        if plan.status == "done":
            tidy(plan.folder)
            console.heading(f"{label}: {plan.detail}")
        else:
            console.heading(f"{label}: {announce(plan)}")
            with claim(plan.folder):  # against the same stage run on its own
                run_stage(plan, data_dir)
            console.info(f"  {stage} took {progress.duration(time.monotonic() - started)}")
        yield {
            "stage": stage, "status": "skipped" if plan.status == "done" else "done", "folder": str(plan.folder),
            "fingerprint": plan.fingerprint, "elapsed_s": round(time.monotonic() - started, 2),
        }  # fmt: skip


def _find(recipe: Recipe, out: Path, stage: str, data_dir: Path | None, again: bool) -> StagePlan:
    plan = next(plan for plan in plan_stages(recipe, out, data_dir) if plan.stage == stage)
    if not again:
        return plan
    if plan.folder.is_dir():
        with claim(plan.folder):  # not while another process is at work there
            forget(plan)
    return _find(recipe, out, stage, data_dir, False)


def _write_recipe(recipe: Recipe, out: Path) -> None:
    from lors_cli.recipe.loading import dump_recipe

    text = dump_recipe(recipe)
    path = out / "recipe.yaml"
    if not path.is_file() or path.read_bytes() != text.encode():
        atomic.write_text(path, text)


def _write_manifest(recipe: Recipe, out: Path, done: list[dict[str, Any]], data_dir: Path | None) -> None:
    from lors_cli.repeat import manifest_content

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
    atomic.write_json(out / "manifest.json", content)


def _origin(recipe: Recipe) -> dict[str, Any]:
    """Which model the run starts from; of one on the hub the commit too."""
    from lors_cli.models.revisions import commit_of
    from lors_cli.models.sources import locate

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
    found = {role: atomic.read_json(out / "eval" / f"{role}.json") for role in recipe.roles()}
    return {role: content for role, content in found.items() if content is not None}
