"""`lors run` and `lors sweep`: a whole recipe, and a recipe over a grid of settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lors_cli.cli import options as o
from lors_cli.cli.framework import PIPELINE, command
from lors_cli.cli.launch import together
from lors_cli.errors import UsageError
from lors_cli.recipe.shipped import find

if TYPE_CHECKING:
    from lors_cli.recipe.schema import Recipe
    from lors_cli.sweep.spread import Executor

pipelines_app = typer.Typer()


@command(
    pipelines_app, PIPELINE, "lors run quickstart", "lors run mine.yaml tune.rank=32 --dry-run",
    "lors run mine.yaml --until prune", "lors run mine.yaml --force tune", "lors run --from-manifest runs/mine",
)  # fmt: skip
def run(
    recipe: o.RecipeName = None, overrides: o.RunSettings = None, out: o.RunOut = None, first: o.First = None,
    last: o.Last = None, force: o.Force = None, from_manifest: o.FromManifest = None,
    allow_changed_inputs: o.ChangedInputs = False, dry_run: o.DryRun = False, nproc: o.Nproc = None,
) -> None:  # fmt: skip
    """Run a recipe: prune, tune, pack, eval; a second call resumes."""
    from lors_cli.cli.views.runs import show_run
    from lors_cli.pipeline.repeat import open_repeat
    from lors_cli.pipeline.running import run_recipe
    from lors_cli.recipe.loading import load_recipe

    repeat, changed = None, None
    if from_manifest is not None:
        repeat = open_repeat(from_manifest, [*([recipe] if recipe else []), *(overrides or [])])
        settings, last = repeat.recipe, last or repeat.last
        folder = out or Path("runs") / f"{settings.name}-repeat"
        changed = repeat.check(folder, allow_changed_inputs=allow_changed_inputs)
    elif recipe is None:
        raise UsageError("no recipe is named.", "lors recipes lists those that are shipped.")
    elif allow_changed_inputs:
        raise UsageError("--allow-changed-inputs is for --from-manifest.")
    else:
        settings = load_recipe(find("recipe", recipe), overrides or [])
        folder = out or Path("runs") / settings.name
    choice: dict[str, Any] = {"first": first, "last": last, "force": tuple(force or ())}
    if dry_run:
        _show_plan(settings, folder, **choice, nproc=nproc)
        return
    together(nproc)
    summary = run_recipe(settings, folder, **choice)
    if repeat is not None:
        files = repeat.compare(folder, {entry["stage"] for entry in summary["stages"]})
        summary["repeat"] = {"manifest": str(repeat.path), "changed": changed, "different_files": files}
    show_run(summary)


def _show_plan(
    recipe: Recipe, folder: Path, first: str | None, last: str | None, force: tuple[str, ...], nproc: int | None
) -> None:  # fmt: skip
    """Show what a run would do, and whether it fits into the memory."""
    from lors_cli.cli.views import runs
    from lors_cli.data.sources import resolve_data_dir
    from lors_cli.pipeline.folders import guard_out
    from lors_cli.pipeline.plans import plan_stages, select
    from lors_cli.pipeline.preflight import troubles

    guard_out(folder, "run")
    data_dir = resolve_data_dir(recipe.data_dir)
    plans = select(plan_stages(recipe, folder, data_dir), first, last, force)
    plans = [replace(plan, num_processes=nproc or plan.num_processes) for plan in plans]
    runs.show_plan(runs.plan_document(recipe.name, folder, plans, troubles(plans, data_dir)))


@command(
    pipelines_app, PIPELINE, "lors sweep smollm2 --dry-run", "lors sweep table1.yaml",
    "lors sweep table1.yaml --only 'wanda-*'", "lors sweep table1 --executor local --gpus 0,1,2,3",
    "lors sweep table1 --executor slurm --partition gpu --gpus 1 --time 08:00:00", "lors sweep table1 --status",
)  # fmt: skip
def sweep(
    sweep: o.SweepName, overrides: o.RunSettings = None, out: o.SweepOut = None, only: o.Only = None,
    executor: o.Executor = None, jobs: o.Jobs = None, gpus: o.Gpus = None, partition: o.Partition = None,
    time_limit: o.TimeLimit = None, sbatch: o.Sbatch = None, status: o.Status = False, dry_run: o.DryRun = False,
    tflops: o.Tflops = None,
) -> None:  # fmt: skip
    """Run a recipe over a grid of settings; cells share their stages."""
    from lors_cli.cli.views import sweeps
    from lors_cli.pipeline.folders import guard_out
    from lors_cli.sweep.cells import load_sweep, select_cells
    from lors_cli.sweep.running import run_sweep
    from lors_cli.sweep.spread import spread_sweep
    from lors_cli.sweep.status import sweep_status

    if tflops is not None and (not dry_run or tflops <= 0):
        raise UsageError(f"--tflops {tflops:g}: a rate above 0, for the times that --dry-run shows.")
    if status and dry_run:
        raise UsageError("--status shows what is, --dry-run what would be done.", "Use one of the two.")
    engine = _executor(executor, jobs, gpus, partition, time_limit, sbatch or [])
    plan = load_sweep(find("sweep", sweep), overrides or [])
    folder = out or Path("sweeps") / plan.name
    chosen = select_cells(plan, only or [])
    if dry_run or status:
        guard_out(folder, "sweep")
        if status:
            sweeps.show_status(sweep_status(plan, folder, chosen))
        else:
            sweeps.show_plan(sweeps.plan_document(plan, folder, chosen, tflops))
        return
    summary = run_sweep(plan, folder, chosen) if engine is None else spread_sweep(plan, folder, chosen, engine)
    sweeps.show_sweep(summary)
    if summary["failed"]:
        raise typer.Exit(next(iter(summary["failed"].values()))["exit_code"])


def _executor(
    name: str | None, jobs: int | None, gpus: str | None, partition: str | None, time_limit: str | None,
    sbatch: list[str],
) -> Executor | None:  # fmt: skip
    """What does the stages of a sweep; None: this process, one after the other."""
    from lors_cli.sweep.local import Local
    from lors_cli.sweep.slurm import Slurm

    given = {"--jobs": jobs, "--gpus": gpus, "--partition": partition, "--time": time_limit, "--sbatch": sbatch}
    takes = {None: (), "local": ("--jobs", "--gpus"), "slurm": tuple(given)}.get(name)
    if takes is None:
        raise UsageError(f"--executor {name}: there is local, this machine, and slurm.")
    odd = [flag for flag, value in given.items() if value and flag not in takes]
    if odd:
        wanted = "slurm" if name else "local or slurm"
        raise UsageError(f"{odd[0]} has no effect without --executor {wanted}.", "Give it, or leave the flag out.")
    if name == "slurm":
        return Slurm.of(partition, gpus, jobs, time_limit, sbatch)
    return Local.of(jobs, gpus) if name == "local" else None


@command(pipelines_app, PIPELINE, name="sweep-stage", hidden=True)
def sweep_stage(sweep: o.SweepName, cell: o.CellOfSweep, stage: o.StageOfSweep, out: o.Out) -> None:
    """Do one stage of a sweep; lors sweep --executor starts it."""
    from lors_cli.sweep.jobs import run_job

    run_job(Path(sweep), cell, stage, out)
