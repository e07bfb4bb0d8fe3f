"""The `lors` command: one thin function a command; heavy imports inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lors_cli import console
from lors_cli.command import (
    Commands,
    Config,
    DataDir,
    Device,
    DryRun,
    Dtype,
    Json,
    Model,
    Out,
    Overrides,
    Seed,
    guarded,
    is_override,
    model_labels,
    split_list,
)  # fmt: skip
from lors_cli.data_view import data_app

app = typer.Typer(
    name="lors",
    cls=Commands,
    help="Prune, tune and evaluate sparse language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, copy and describe the shipped recipes.", pretty_exceptions_enable=False)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")


def _model_config(path: str, dtype: str, device: str) -> Any:
    """A ModelConfig from flags, checked as a recipe's would be."""
    from lors_cli.loading import load_model_config

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
    from lors_cli.loading import find_config, load_stage
    from lors_cli.pipeline import check_memory, guard_out, run_single
    from lors_cli.plans import plan_single, resolve_data_dir

    guard_out(out, stage, [model.path for model in models.values()])
    settings = load_stage(stage, find_config(config) if config else None, overrides or [], flags)
    data = resolve_data_dir(str(data_dir) if data_dir else None)
    plan = plan_single(stage, settings, models, out, data)
    if dry_run:
        views.show_plan(views.plan_document(stage, out, [plan]))
        check_memory(plan)
        return None
    run_single(plan, data)
    return plan


@app.command()
@guarded
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<name>.")] = None,
    dry_run: DryRun = False,
    first: Annotated[str | None, typer.Option("--from", help="Start at this stage.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Stop after this stage.")] = None,
    force: Annotated[list[str] | None, typer.Option("--force", help="Do this stage again.")] = None,
) -> None:
    """Run a recipe: prune, tune, evaluate. A second call goes on where the first stopped."""
    from lors_cli import views
    from lors_cli.loading import find_recipe, load_recipe
    from lors_cli.pipeline import check_memory, guard_out, run_recipe
    from lors_cli.plans import plan_stages, resolve_data_dir, select

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
    views.show_run(run_recipe(settings, folder, first=first, last=last, force=again))


@app.command()
@guarded
def prune(
    model: Model,
    out: Out,
    overrides: Overrides = None,
    config: Config = None,
    method: Annotated[str | None, typer.Option(help="magnitude, wanda, sparsegpt, ria or admm.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M such as 2:4, or unstructured.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, with --pattern unstructured.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Calibration text: a source's name or a file.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a calibration sequence.")] = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    data_dir: DataDir = None,
    dry_run: DryRun = False,
) -> None:
    """Prune a dense causal LM to a sparse checkpoint."""
    if sparsity is not None and pattern is None and config is None:
        pattern = "unstructured"
    flags = _given(
        method=method, pattern=pattern, sparsity=sparsity, calibration__dataset=calibration,
        calibration__num_samples=num_samples, calibration__sequence_length=sequence_length, calibration__seed=seed,
    )  # fmt: skip
    models = {"dense": _model_config(model, dtype, device)}
    plan = _stage("prune", models, out, config, overrides, flags, data_dir, dry_run)
    if plan is not None:
        _show_record(plan.folder)


@app.command()
@guarded
def tune(
    model: Model,
    out: Out,
    overrides: Overrides = None,
    config: Config = None,
    method: Annotated[str | None, typer.Option(help="lors, sqft, sqft-gc, spp, spp-gc, hira or lora.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Tuning text: a source's name or a file.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Numerator of the adapters' scale.")] = None,
    init: Annotated[str | None, typer.Option(help="gradient, gradient-exact or kaiming.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides epochs.")] = None,
    max_tokens: Annotated[float | None, typer.Option(help="Tokens of streamed text, e.g. 0.5e9.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples an optimiser step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a sample.")] = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    data_dir: DataDir = None,
    dry_run: DryRun = False,
) -> None:
    """Tune a sparse causal LM with LoRS and merge the adapter, zeros kept."""
    flags = _given(
        method=method, data__dataset=dataset, rank=rank, alpha=alpha, init=init, learning_rate=learning_rate,
        max_steps=max_steps, max_tokens=max_tokens, epochs=epochs, batch_size=batch_size,
        data__max_length=max_length, seed=seed,
    )  # fmt: skip
    models = {"pruned": _model_config(model, dtype, device)}
    plan = _stage("tune", models, out, config, overrides, flags, data_dir, dry_run)
    if plan is not None:
        _show_record(plan.folder)


@app.command(name="eval")
@guarded
def evaluate(
    arguments: Annotated[list[str], typer.Argument(metavar="MODEL... [KEY=VALUE]...", help="Models, then settings.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for results; without it they are only shown.")
    ] = None,
    config: Config = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated lm-evaluation-harness tasks; '' for none.")] = None,
    perplexity: Annotated[str | None, typer.Option(help="Comma-separated texts for token perplexity.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many documents a task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a forward pass.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    data_dir: DataDir = None,
    dry_run: DryRun = False,
) -> None:
    """Score one or more models, zero-shot and by perplexity, side by side."""
    import tempfile

    from lors_cli import run_dir, views

    overrides = [argument for argument in arguments if is_override(argument)]
    paths = [argument for argument in arguments if not is_override(argument)]
    models = {label: _model_config(path, dtype, device) for label, path in model_labels(paths).items()}
    flags = _given(tasks=split_list(tasks), perplexity=split_list(perplexity), limit=limit, batch_size=batch_size)
    with tempfile.TemporaryDirectory(prefix="lors-eval-") as scratch:
        folder = out or Path(scratch) / "eval"
        plan = _stage("eval", models, folder, config, overrides, flags, data_dir, dry_run)
        if plan is None:
            return
        found = {label: run_dir.read_json(folder / f"{label}.json") for label in models}
    views.show_results(found)
    console.result(f"results {out}" if out else "The results are not kept; give --out to keep them.")
    console.document({"results": found, "out": str(out) if out else None})


def _show_record(folder: Path) -> None:
    """The result of prune or tune: its metrics and where it is. Processes that only helped have nothing to show."""
    from dataclasses import asdict

    from lors_cli import parallel, run_dir

    if not parallel.is_main():
        return
    record = run_dir.read_record(folder)
    assert record is not None
    metrics = record.metrics
    console.result(f"{metrics['pattern']}, {100 * metrics['sparsity']:.2f} % zeros in {len(metrics['layers'])} linears")
    if "last_loss" in metrics:
        console.result(f"loss {metrics['first_loss']:.4f} → {metrics['last_loss']:.4f} in {metrics['steps']} steps")
    console.result(f"{record.stage} {folder}")
    console.document({"out": str(folder), **asdict(record)})


@app.command()
@guarded
def merge(
    model: Annotated[str, typer.Argument(help="The sparse base.")],
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_config.json.")],
    out: Out,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Merge a LoRS adapter into its sparse base, zeros kept."""
    from lors_cli.pipeline import claim, guard_out
    from lors_cli.tuning.adapter import merge as merge_adapter

    _model_config(model, dtype, device)
    guard_out(out, "merge", [model])
    if (adapter / "adapter" / "adapter_config.json").is_file():  # the folder of a tune stage
        adapter = adapter / "adapter"
    with claim(out):
        metrics = merge_adapter(model, adapter, out, dtype=dtype, device=device)
    console.result(f"{metrics['layers_merged']} layers merged, {metrics['zeroed']} kept weights became zero")
    console.result(f"merged {out}")
    console.document({"out": str(out), **metrics})


@app.command()
@guarded
def inspect(
    model: Model,
    pattern: Annotated[str | None, typer.Option(help="Hold it against this N:M.")] = None,
) -> None:
    """Show the sparsity of a checkpoint; exit 5 when it breaks its pattern."""
    from lors_cli.inspection import inspect as inspect_model
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


@app.command()
@guarded
def bench(
    shape: Annotated[str, typer.Option(help="A model's shape with random 2:4 weights: llama3-8b, llama2-7b, …")] = (
        "smollm2-135m"
    ),
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder instead of a shape.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Only so many decoder blocks.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated; default: all but lora-float32 and lors-compressed.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens a sequence, comma-separated.")] = "512,1024,2048",
    ranks: Annotated[str, typer.Option(help="Ranks, comma-separated.")] = "16,32,64",
    batch_size: Annotated[int, typer.Option(help="Sequences a micro-batch.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    checkpointing: Annotated[str, typer.Option(help="Block checkpointing: off, on, or both.")] = "off",
    rounds: Annotated[int, typer.Option(help="Turns of every method.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps a turn.")] = 3,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and figures; goes on there.")] = None,
) -> None:
    """Time and memory of a training step: LoRS, SQFT, SPP, HiRA and LoRA on the same weights."""
    from lors_cli.bench_view import run_bench

    run_bench(
        {"shape": None if model else shape, "model": model, "blocks": blocks, "methods": methods, "lengths": lengths,
         "ranks": ranks, "batch_size": batch_size, "accumulation": accumulation, "checkpointing": checkpointing,
         "rounds": rounds, "steps": steps, "dtype": dtype, "device": device}, out,
    )  # fmt: skip


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, json_mode: Json = False) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        list_shipped(json_mode=json_mode)


@guarded
def list_shipped() -> None:
    """Names and first comment lines of the shipped recipes."""
    from lors_cli.loading import recipe_summary, shipped_recipes

    found = {name: recipe_summary(path) for name, path in shipped_recipes().items()}
    console.table(["recipe", "what it does"], [[name, summary] for name, summary in found.items()], prose=True)
    console.result("lors recipes copy NAME writes one here to edit; lors run NAME runs it.")
    console.document([{"name": name, "summary": summary} for name, summary in found.items()])


@recipes_app.command()
@guarded
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
    target: Annotated[Path | None, typer.Argument(help="File or folder; default: here.")] = None,
) -> None:
    """Write a shipped recipe here, to edit and run."""
    from lors_cli import run_dir
    from lors_cli.errors import UsageError
    from lors_cli.loading import find_shipped_recipe

    source = find_shipped_recipe(name)
    path = target or Path(source.name)
    path = path / source.name if path.is_dir() else path
    if path.exists():
        raise UsageError(f"{path} is there already; it is not overwritten.", "Name another file.")
    run_dir.write_bytes(path, source.read_bytes())
    console.result(f"wrote {path}; run it with: lors run {path}")
    console.document({"wrote": str(path)})


@recipes_app.command()
@guarded
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from lors_cli.loading import recipe_schema

    if console.is_json():
        console.document(recipe_schema())
    else:
        typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
@guarded
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write a run's report again."""
    from lors_cli.errors import LorsError, MissingError
    from lors_cli.loading import load_recipe
    from lors_cli.pipeline import finished_stages
    from lors_cli.plans import resolve_data_dir
    from lors_cli.report import write_report

    if not (run_folder / "recipe.yaml").is_file():
        raise MissingError(
            f"{run_folder} is no run folder: it has no recipe.yaml.",
            "Give the folder that lors run wrote, such as runs/quickstart.",
        )
    settings = load_recipe(run_folder / "recipe.yaml")
    try:
        finished = finished_stages(settings, run_folder, resolve_data_dir(settings.data_dir))
    except LorsError as error:
        console.warn(f"whether the results belong to recipe.yaml cannot be checked: {error.message}")
        finished = None
    path = write_report(run_folder, finished)
    console.result(f"report {path}")
    console.document({"report": str(path)})


def main() -> None:
    """Entry point of the `lors` command."""
    app()


if __name__ == "__main__":
    main()
