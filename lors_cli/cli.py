"""The `lors` command: one thin function a command; heavy imports inside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import typer

from lors_cli import options as o
from lors_cli.command import (
    AROUND,
    HELP,
    PIPELINE,
    STAGES,
    Commands,
    command,
    is_override,
    model_labels,
    split_list,
)
from lors_cli.data_view import data_app
from lors_cli.machine import processes
from lors_cli.output import console, progress
from lors_cli.recipe_commands import recipes_app

FIRST_STEPS = """[bold]First steps[/bold]
lors doctor                        what is there and what is missing
lors run quickstart                a small model, start to end, on a CPU
lors recipes copy llama3-8b-2of4   a recipe to edit
lors run llama3-8b-2of4.yaml --dry-run"""
"""The end of `lors --help`."""

app = typer.Typer(
    name="lors", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(recipes_app, name="recipes", rich_help_panel=HELP)
app.add_typer(data_app, name="data", rich_help_panel=AROUND)


@app.callback(epilog=FIRST_STEPS)
def lors(version: o.Version = False) -> None:
    """Prune, tune and evaluate sparse language models."""


def _model_config(path: str, dtype: str, device: str) -> Any:
    """A ModelConfig from flags, checked as a recipe's would be."""
    from lors_cli.recipe.loading import load_model_config

    return load_model_config(path, dtype=dtype, device=device)


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that were given, by setting (double underscore for a dot)."""
    return {name.replace("__", "."): value for name, value in flags.items() if value is not None}


def _stage(
    stage: Literal["prune", "tune", "eval"], models: dict[str, Any], out: Path, config: str | None,
    overrides: list[str] | None,
    flags: dict[str, Any], data_dir: Path | None, dry_run: bool,
) -> Any:  # fmt: skip
    """Plan and run one stage; its plan when it ran or was done, None after a dry run."""
    from lors_cli import views
    from lors_cli.data.sources import resolve_data_dir
    from lors_cli.pipeline.folders import guard_out
    from lors_cli.pipeline.plans import plan_single
    from lors_cli.pipeline.resources import check_memory
    from lors_cli.pipeline.running import run_single
    from lors_cli.recipe.loading import load_stage
    from lors_cli.recipe.shipped import find_config

    settings = load_stage(stage, find_config(config) if config else None, overrides or [], flags)
    data = resolve_data_dir(str(data_dir) if data_dir else None)

    def make_plan() -> Any:
        guard_out(out, stage, [model.path for model in models.values()])
        with progress.busy("looking at what is done"):
            return plan_single(stage, settings, models, out, data)

    with processes.joined():
        plan = processes.from_main(make_plan)
        if dry_run:
            views.show_plan(views.plan_document(stage, out, [plan]))
            check_memory(plan)
            return None
        run_single(plan, data)
    return plan


def _together(num_processes: int | None) -> None:
    """Do this command in several processes, where that is asked for."""
    from lors_cli.launch import together

    together(num_processes)


@command(
    app, PIPELINE, "lors run quickstart", "lors run mine.yaml tune.rank=32 --dry-run",
    "lors run mine.yaml --until prune", "lors run mine.yaml --force tune", "lors run --from-manifest runs/mine",
)  # fmt: skip
def run(
    recipe: o.RecipeName = None,
    overrides: o.RunSettings = None,
    out: o.RunOut = None,
    first: o.First = None,
    last: o.Last = None,
    force: o.Force = None,
    from_manifest: o.FromManifest = None,
    allow_changed_inputs: o.ChangedInputs = False,
    dry_run: o.DryRun = False,
    nproc: o.Nproc = None,
) -> None:
    """Run a recipe: prune, tune, eval; a second call goes on from there."""
    from lors_cli import views
    from lors_cli.data.sources import resolve_data_dir
    from lors_cli.errors import UsageError
    from lors_cli.pipeline.folders import guard_out
    from lors_cli.pipeline.plans import plan_stages, select
    from lors_cli.pipeline.repeat import open_repeat
    from lors_cli.pipeline.resources import check_memory
    from lors_cli.pipeline.running import run_recipe
    from lors_cli.recipe.loading import load_recipe
    from lors_cli.recipe.shipped import find_recipe

    repeat = None
    if from_manifest is not None:
        given = [*([recipe] if recipe else []), *(overrides or [])]
        repeat = open_repeat(from_manifest, given)
        settings, last = repeat.recipe, last or repeat.last
        folder = out or Path("runs") / f"{settings.name}-repeat"
        changed = repeat.check(folder, allow_changed_inputs=allow_changed_inputs)
    elif recipe is None:
        raise UsageError("no recipe is named.", "lors recipes lists those that are shipped.")
    elif allow_changed_inputs:
        raise UsageError("--allow-changed-inputs is for --from-manifest.")
    else:
        settings = load_recipe(find_recipe(recipe), overrides or [])
        folder = out or Path("runs") / settings.name
    again = tuple(force or ())
    if dry_run:
        guard_out(folder, "run")
        plans = select(plan_stages(settings, folder, resolve_data_dir(settings.data_dir)), first, last, again)
        views.show_plan(views.plan_document(settings.name, folder, plans))
        for plan in plans:
            check_memory(plan)
        return
    _together(nproc)
    summary = run_recipe(settings, folder, first=first, last=last, force=again)
    if repeat is not None:
        summary["repeat"] = {
            "manifest": str(repeat.path), "changed": changed, "different_files": repeat.compare(folder)
        }  # fmt: skip
    views.show_run(summary)


@command(
    app, PIPELINE, "lors sweep smollm2 --dry-run", "lors sweep table1.yaml", "lors sweep table1.yaml --only 'wanda-*'",
)  # fmt: skip
def sweep(
    sweep: o.SweepName,
    overrides: o.RunSettings = None,
    out: o.SweepOut = None,
    only: o.Only = None,
    dry_run: o.DryRun = False,
    tflops: o.Tflops = None,
) -> None:
    """Run a recipe over a grid of settings; cells share their stages."""
    from lors_cli.errors import UsageError
    from lors_cli.pipeline.folders import guard_out
    from lors_cli.recipe.shipped import find_sweep
    from lors_cli.sweep import views
    from lors_cli.sweep.cells import load_sweep, select_cells
    from lors_cli.sweep.running import run_sweep

    if tflops is not None and (not dry_run or tflops <= 0):
        raise UsageError(f"--tflops {tflops:g}: a rate above 0, for the times that --dry-run shows.")
    plan = load_sweep(find_sweep(sweep), overrides or [])
    folder = out or Path("sweeps") / plan.name
    chosen = select_cells(plan, only or [])
    if dry_run:
        guard_out(folder, "sweep")
        views.show_plan(views.plan_document(plan, folder, chosen, tflops))
        return
    summary = run_sweep(plan, folder, chosen)
    views.show_sweep(summary)
    if summary["failed"]:
        raise typer.Exit(next(iter(summary["failed"].values()))["exit_code"])


@command(
    app, STAGES, "lors prune HuggingFaceTB/SmolLM2-135M --out sparse",
    "lors prune MODEL --out sparse --method wanda --pattern 4:8 --calibration pydoc",
    "lors prune MODEL --out sparse --sparsity 0.6 refit=true --dry-run",
)  # fmt: skip
def prune(
    model: o.Model,
    out: o.Out,
    overrides: o.PruneSettings = None,
    config: o.PruneConfig = None,
    method: o.PruneMethod = None,
    pattern: o.PrunePattern = None,
    sparsity: o.PruneSparsity = None,
    calibration: o.Calibration = None,
    num_samples: o.NumSamples = None,
    sequence_length: o.SequenceLength = None,
    seed: o.CalibrationSeed = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    data_dir: o.DataDir = None,
    dry_run: o.DryRun = False,
    nproc: o.Nproc = None,
) -> None:
    """Prune a dense causal LM to a sparse checkpoint."""
    if sparsity is not None and pattern is None and config is None:
        pattern = "unstructured"
    flags = _given(
        method=method, pattern=pattern, sparsity=sparsity, calibration__dataset=calibration,
        calibration__num_samples=num_samples, calibration__sequence_length=sequence_length, calibration__seed=seed,
    )  # fmt: skip
    models = {"dense": _model_config(model, dtype, device)}
    _together(None if dry_run else nproc)
    plan = _stage("prune", models, out, config, overrides, flags, data_dir, dry_run)
    if plan is not None:
        _show_record(plan.folder)


@command(
    app, STAGES, "lors tune sparse --out tuned",
    "lors tune sparse --out tuned --dataset mine.jsonl --rank 32 --epochs 1",
    "lors tune sparse --out sqft --method sqft gradient_checkpointing=true",
)  # fmt: skip
def tune(
    model: o.Model,
    out: o.Out,
    overrides: o.TuneSettings = None,
    config: o.TuneConfig = None,
    method: o.TuneMethod = None,
    rank: o.Rank = None,
    alpha: o.Alpha = None,
    init: o.Init = None,
    dataset: o.Dataset = None,
    max_length: o.MaxLength = None,
    learning_rate: o.LearningRate = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    max_tokens: o.MaxTokens = None,
    batch_size: o.TuneBatch = None,
    seed: o.TuneSeed = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    data_dir: o.DataDir = None,
    dry_run: o.DryRun = False,
    nproc: o.Nproc = None,
) -> None:
    """Tune a sparse causal LM with LoRS and merge, zeros kept."""
    flags = _given(
        method=method, data__dataset=dataset, rank=rank, alpha=alpha, init=init, learning_rate=learning_rate,
        max_steps=max_steps, max_tokens=max_tokens, epochs=epochs, batch_size=batch_size,
        data__max_length=max_length, seed=seed,
    )  # fmt: skip
    models = {"pruned": _model_config(model, dtype, device)}
    _together(None if dry_run else nproc)
    plan = _stage("tune", models, out, config, overrides, flags, data_dir, dry_run)
    if plan is not None:
        _show_record(plan.folder)


@command(
    app, STAGES, "lors eval MODEL sparse tuned",
    "lors eval sparse tuned --tasks arc_easy,boolq --limit 200 --out scores",
    "lors eval tuned --tasks '' --perplexity wikitext2 perplexity_windows=20",
    name="eval",
)  # fmt: skip
def evaluate(
    arguments: o.EvalArguments,
    out: o.EvalOut = None,
    config: o.EvalConfig = None,
    tasks: o.Tasks = None,
    perplexity: o.Perplexity = None,
    limit: o.Limit = None,
    batch_size: o.EvalBatch = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    data_dir: o.DataDir = None,
    dry_run: o.DryRun = False,
    nproc: o.Nproc = None,
) -> None:
    """Score models side by side, zero-shot and by perplexity."""
    import tempfile
    from dataclasses import asdict

    from lors_cli import views
    from lors_cli.evaluation.significance import compare_models
    from lors_cli.files import atomic

    overrides = [argument for argument in arguments if is_override(argument)]
    paths = [argument for argument in arguments if not is_override(argument)]
    models = {label: _model_config(path, dtype, device) for label, path in model_labels(paths).items()}
    flags = _given(tasks=split_list(tasks), perplexity=split_list(perplexity), limit=limit, batch_size=batch_size)
    _together(None if dry_run else nproc)
    with tempfile.TemporaryDirectory(prefix="lors-eval-") as scratch:
        folder = out or Path(scratch) / "eval"
        plan = _stage("eval", models, folder, config, overrides, flags, data_dir, dry_run)
        if plan is None or not processes.is_main():
            return
        found: dict[str, Any] = {label: atomic.read_json(folder / f"{label}.json") for label in models}
        comparisons = compare_models(folder, found)
    views.show_results(found, comparisons)
    if out:
        console.path("results", out)
    else:
        console.result("The results are not kept; give --out to keep them.")
    compared = [asdict(comparison) for comparison in comparisons]
    console.document({"results": found, "comparisons": compared, "out": str(out) if out else None})


def _show_record(folder: Path) -> None:
    """The result of prune or tune: its metrics and where it is. Processes that only helped have nothing to show."""
    from lors_cli import views
    from lors_cli.files import records

    if processes.is_main():
        record = records.read_record(folder)
        assert record is not None
        views.show_record(record, folder)


@command(app, STAGES, "lors merge sparse tuned/adapter --out merged")
def merge(model: o.Base, adapter: o.Adapter, out: o.Out, device: o.Device = "auto", dtype: o.Dtype = "auto") -> None:
    """Merge a LoRS adapter into its sparse base, zeros kept."""
    from lors_cli.pipeline.folders import claim, guard_out
    from lors_cli.tuning.merge import merge as merge_adapter

    _model_config(model, dtype, device)
    guard_out(out, "merge", [model])
    if (adapter / "adapter" / "adapter_config.json").is_file():  # the folder of a tune stage
        adapter = adapter / "adapter"
    with claim(out):
        metrics = merge_adapter(model, adapter, out, dtype=dtype, device=device)
    console.result(f"{metrics['layers_merged']} layers merged, {metrics['zeroed']} kept weights became zero")
    console.path("merged", out)
    console.document({"out": str(out), **metrics})


@command(app, AROUND, "lors inspect sparse", "lors inspect tuned --pattern 2:4 --json")
def inspect(model: o.Model, pattern: o.Against = None) -> None:
    """Show a checkpoint's sparsity; exit 5 when it breaks its pattern."""
    from lors_cli.models.inspection import inspect as inspect_model
    from lors_cli.sparsity import Pattern
    from lors_cli.views import show_inspection

    document = inspect_model(_model_config(model, "auto", "cpu"), Pattern.parse(pattern) if pattern else None)
    show_inspection(model, document)
    if document["violations"]:
        console.error(
            f"{document['violations']} violations of {document['pattern']} in {model}.",
            "Something filled zeros after pruning: prune again, or tune and merge with lors.",
        )
        raise typer.Exit(5)


@command(
    app, AROUND, "lors bench --blocks 2 --lengths 512 --ranks 16", "lors bench --model sparse --out bench",
    "lors bench --shape llama3-8b --blocks 1 --methods lors,sqft,lora",
)  # fmt: skip
def bench(
    out: o.BenchOut = None,
    shape: o.Shape = "smollm2-135m",
    model: o.BenchModel = None,
    blocks: o.Blocks = None,
    methods: o.BenchMethods = None,
    lengths: o.Lengths = "512,1024,2048",
    ranks: o.Ranks = "16,32,64",
    batch_size: o.BenchBatch = 1,
    accumulation: o.Accumulation = 1,
    checkpointing: o.Checkpointing = "off",
    rounds: o.Rounds = 5,
    steps: o.Steps = 3,
    dtype: o.BenchDtype = "bfloat16",
    device: o.Device = "auto",
) -> None:
    """Time and memory of a training step of LoRS, SQFT, SPP, HiRA, LoRA."""
    from lors_cli.bench_view import run_bench

    run_bench(
        {"shape": None if model else shape, "model": model, "blocks": blocks, "methods": methods, "lengths": lengths,
         "ranks": ranks, "batch_size": batch_size, "accumulation": accumulation, "checkpointing": checkpointing,
         "rounds": rounds, "steps": steps, "dtype": dtype, "device": device}, out,
    )  # fmt: skip


@command(app, AROUND, "lors report runs/quickstart", "lors report sweeps/table1 --format html")
def report(folder: o.ReportFolder, formats: o.Formats = None) -> None:
    """Write the reports of a run or a sweep again."""
    from lors_cli.data.sources import resolve_data_dir
    from lors_cli.errors import LorsError, MissingError
    from lors_cli.pipeline.running import finished_stages
    from lors_cli.recipe.loading import load_recipe
    from lors_cli.report.output import FORMATS, check_formats
    from lors_cli.report.run import write_run_report
    from lors_cli.report.sweep import write_sweep_report

    chosen = formats or FORMATS
    check_formats(chosen)
    if (folder / "sweep.json").is_file():
        with progress.busy("writing the report"):
            paths = write_sweep_report(folder, chosen)
    elif (folder / "recipe.yaml").is_file():
        settings = load_recipe(folder / "recipe.yaml")
        try:
            finished = finished_stages(settings, folder, resolve_data_dir(settings.data_dir))
        except LorsError as error:
            console.warn(f"whether the results belong to recipe.yaml cannot be checked: {error.message}")
            finished = None
        with progress.busy("writing the report"):
            paths = write_run_report(folder, finished, chosen)
    else:
        raise MissingError(
            f"{folder} is no run folder and no sweep folder: it has neither recipe.yaml nor sweep.json.",
            "Give the folder that lors run or lors sweep wrote, such as runs/quickstart.",
        )
    for path in paths:
        console.path("report", path)
    console.document({"reports": [str(path) for path in paths]})


@command(app, HELP, "lors doctor", "lors doctor --json")
def doctor() -> None:
    """Show what this machine has and lacks; exit 3 if lors cannot work."""
    from lors_cli.doctor.examine import any_failed, document, examine, show

    findings = examine()
    show(findings)
    console.document(document(findings))
    if any_failed(findings):
        raise typer.Exit(3)


def main() -> None:
    """Entry point of the `lors` command."""
    if processes.LAUNCHER in os.environ:
        from lors_cli.launch import die_with_launcher

        die_with_launcher()
    app()


if __name__ == "__main__":
    main()
