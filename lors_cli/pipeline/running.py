"""`run_recipe`: the stages in order, finished ones skipped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lors_cli.data.sources import resolve_data_dir
from lors_cli.errors import MissingError
from lors_cli.files import atomic, records
from lors_cli.machine import processes
from lors_cli.machine.determinism import determinism
from lors_cli.output import console, progress
from lors_cli.pipeline.folders import claim, forget, guard_out, tidy
from lors_cli.pipeline.manifest import has_new, write_manifest
from lors_cli.pipeline.plans import StagePlan, announce, is_gone_on_with, plan_stages, select, warn_of_replaced
from lors_cli.pipeline.preflight import refuse, troubles
from lors_cli.pipeline.resources import check_disk, check_memory
from lors_cli.pipeline.stages import STAGES
from lors_cli.pipeline.standing import RECIPE_NAME, standing_recipe, standing_stages
from lors_cli.recipe.schema import Recipe


def run_single(plan: StagePlan, data_dir: Path | None) -> None:
    """Do a stage on its own, unless it is done, or was by another process since it was planned."""
    with claim(plan.folder):
        finished = partial(records.is_finished, plan.folder, plan.fingerprint)
        if STAGES[plan.stage].makes and processes.from_main(finished):
            plan = replace(plan, status="done")
        if plan.status == "done":
            if processes.is_main():
                atomic.remove(records.leftovers(plan.folder))
            console.heading(f"{plan.stage}: finished earlier, nothing to do")
            return
        warn_of_replaced([plan])
        console.heading(f"{plan.stage}: {announce(plan)}")
        run_stage(plan, data_dir)


def run_stage(plan: StagePlan, data_dir: Path | None) -> None:
    """Do one stage's work."""
    check_disk(plan)
    check_memory(plan)
    with _told_when_gone(plan):
        STAGES[plan.stage].run(plan.config, plan.models, plan.folder, data_dir)


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
            "The same command resumes from what is left; two runs must not share a folder.",
        ) from error


def run_recipe(
    recipe: Recipe, out: Path, *, first: str | None = None, last: str | None = None, force: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run a recipe's stages in order; finished ones are skipped, begun ones resume.

    Args:
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
            plans = select(plan_stages(recipe, out, data_dir), first, last, force)
        refuse(troubles(plans, data_dir))
        warn_of_replaced(plans)
        return [plan.stage for plan in plans]

    with processes.joined():
        stages = processes.from_main(stages_to_do)
        with claim(out):
            with determinism(recipe.deterministic):
                done = _run_plans(recipe, out, stages, data_dir, force)
            return processes.from_main(lambda: _finish(recipe, out, data_dir, done))


def _finish(recipe: Recipe, out: Path, data_dir: Path | None, done: list[dict[str, Any]]) -> dict[str, Any]:
    """Write manifest and report; the run's summary."""
    from lors_cli.evaluation.significance import compare_models

    _note(recipe, out, data_dir, done, len(done))
    asked = any(entry["stage"] == "eval" for entry in done)
    scores = results(out, recipe) if asked and "eval" in standing_stages(out) else {}
    compared = compare_models(out / "eval", scores)
    report = str(out / "report.md")
    return {"run": str(out), "stages": done, "results": scores, **compared, "report": report}


def _note(recipe: Recipe, out: Path, data_dir: Path | None, done: list[dict[str, Any]], num_stages: int) -> None:
    """Have recipe.yaml, manifest.json and the report speak of the stages that lie in the run folder.

    Args:
        recipe: what this call is to do.
        out: the run folder.
        data_dir: local datasets.
        done: what it has done, a stage an entry.
        num_stages: of the call; a report that is not there yet is written after the last one.
    """
    from lors_cli.report.run import write_run_report

    write_manifest(_write_recipe(recipe, out, begins=False), out, done, data_dir)
    if len(done) < num_stages and not (out / "report.md").is_file():
        return
    with progress.busy("writing the report"):
        write_run_report(out, standing_stages(out))


def _run_plans(
    recipe: Recipe, out: Path, stages: list[str], data_dir: Path | None, force: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Do the stages one after the other; what is written of an earlier result is brought up to date with each."""
    done: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, 1):
        plan = processes.from_main(lambda: _find(recipe, out, stage, data_dir, stage in force))  # noqa: B023
        started = time.monotonic()
        label = f"[{number}/{len(stages)}] {stage}"
        if plan.status == "done":
            tidy(plan.folder)
            console.heading(f"{label}: {plan.detail}")
        else:
            console.heading(f"{label}: {announce(plan)}")
            processes.from_main(lambda: _write_recipe(recipe, out))
            with claim(plan.folder):  # against the same stage run on its own
                run_stage(plan, data_dir)
            console.info(f"  {stage} took {progress.duration(time.monotonic() - started)}")
        done.append({
            "stage": stage, "status": "skipped" if plan.status == "done" else "done", "folder": str(plan.folder),
            "fingerprint": plan.fingerprint, "elapsed_s": round(time.monotonic() - started, 2),
        })  # fmt: skip
        if plan.status != "done" and number < len(stages):  # the next one may fail
            processes.from_main(lambda: _note(recipe, out, data_dir, done, len(stages)))
    return done


def _find(recipe: Recipe, out: Path, stage: str, data_dir: Path | None, again: bool) -> StagePlan:
    plan = next(plan for plan in plan_stages(recipe, out, data_dir) if plan.stage == stage)
    if not again or is_gone_on_with(plan):
        return plan
    if plan.folder.is_dir():
        with claim(plan.folder):  # not while another process is at work there
            forget(plan)
    return _find(recipe, out, stage, data_dir, False)


def _write_recipe(recipe: Recipe, out: Path, *, begins: bool = True) -> Recipe:
    """Write `recipe.yaml` where it would change: the settings of what lies there, and of what is yet to be done."""
    from lors_cli.recipe.loading import dump_recipe

    found = standing_recipe(recipe, out, has_new=has_new(out), begins=begins)
    text, path = dump_recipe(found), out / RECIPE_NAME
    if not path.is_file() or path.read_bytes() != text.encode():
        atomic.write_text(path, text)
    return found


def results(out: Path, recipe: Recipe) -> dict[str, Any]:
    """The evaluation results of a run by model."""
    found = {role: atomic.read_json(out / "eval" / f"{role}.json") for role in recipe.roles()}
    return {role: content for role, content in found.items() if content is not None}
