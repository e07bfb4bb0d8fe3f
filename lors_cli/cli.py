"""The `lors` command: one thin function a command; heavy imports inside it."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from lors_cli import console

app = typer.Typer(
    name="lors",
    help="Prune, tune and evaluate sparse language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, copy and describe the shipped recipes.", pretty_exceptions_enable=False)
app.add_typer(recipes_app, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings, errors and the result.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More details; -vv: the libraries' logs.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan; nothing is written.")]
Config = Annotated[str | None, typer.Option("--config", help="YAML file with the stage's settings, or a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. rank=32.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder with local datasets; else $LORS_DATA_DIR.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random in the stage.")]
Model = Annotated[str, typer.Argument(help="Folder, hub id, .gguf file or package://module/file.gguf.")]


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Configure the console and turn every exception into one message and its exit code (DESIGN §2)."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        console.configure(
            json_mode=kwargs.pop("json_mode", False),
            verbosity=-1 if kwargs.pop("quiet", False) else kwargs.pop("verbose", 0),
        )
        kwargs.pop("verbose", None)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if console.verbosity() < 2:  # the libraries' own bars; downloads keep theirs
            os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, Exception) as error:
            fail(error)

    command.__signature__ = _with_common_options(function)  # type: ignore[attr-defined]
    return command


def _with_common_options(function: Callable[..., Any]) -> Any:
    """The command's signature plus --json, -q and -v."""
    import inspect

    signature = inspect.signature(function, eval_str=True)
    common = [("json_mode", Json, False), ("quiet", Quiet, False), ("verbose", Verbose, 0)]
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
             for name, kind, default in common]  # fmt: skip
    return signature.replace(parameters=[*signature.parameters.values(), *extra])


def fail(error: BaseException) -> NoReturn:
    """Say what went wrong and leave with the right exit code."""
    from lors_cli.errors import translate

    if isinstance(error, typer.Exit):
        raise error
    if isinstance(error, KeyboardInterrupt):
        console.error("interrupted; what was finished is kept.", "The same command goes on from there.")
        _fail_document("interrupted", None, 130)
        raise typer.Exit(130) from None
    known = translate(error)
    if known is None:
        traceback.print_exception(error, file=sys.stderr)
        console.error(
            f"this is a bug in lors: {type(error).__name__}: {error}", "Please report it with the lines above."
        )
        _fail_document(str(error), None, 1)
        raise typer.Exit(1) from None
    if console.verbosity() >= 2:
        traceback.print_exception(error, file=sys.stderr)
    console.error(known.message, known.hint)
    _fail_document(known.message, known.hint, known.exit_code)
    raise typer.Exit(known.exit_code) from None


def _fail_document(message: str, hint: str | None, exit_code: int) -> None:
    console.document({"error": {"message": message, "hint": hint, "exit_code": exit_code}})


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
    from lors_cli.pipeline import plan_single, resolve_data_dir, run_single

    settings = load_stage(stage, find_config(config) if config else None, overrides or [], flags)
    data = resolve_data_dir(str(data_dir) if data_dir else None)
    plan = plan_single(stage, settings, models, out, data)
    if dry_run:
        views.show_plan(views.plan_document(stage, out, [plan]))
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
    from lors_cli.pipeline import plan_stages, resolve_data_dir, run_recipe, select

    settings = load_recipe(find_recipe(recipe), overrides or [])
    folder = out or Path("runs") / settings.name
    if dry_run:
        plans = plan_stages(settings, folder, resolve_data_dir(settings.data_dir))
        views.show_plan(views.plan_document(settings.name, folder, select(plans, first, last)))
        return
    views.show_run(run_recipe(settings, folder, first=first, last=last, force=tuple(force or ())))


@app.command()
@guarded
def prune(
    model: Model,
    out: Out,
    overrides: Overrides = None,
    config: Config = None,
    method: Annotated[str | None, typer.Option(help="magnitude, wanda, sparsegpt or ria.")] = None,
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
    method: Annotated[str | None, typer.Option(help="lors.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Tuning text: a source's name or a file.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Numerator of the adapters' scale.")] = None,
    init: Annotated[str | None, typer.Option(help="gradient or kaiming.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides epochs.")] = None,
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
        max_steps=max_steps, epochs=epochs, batch_size=batch_size, data__max_length=max_length, seed=seed,
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

    overrides = [argument for argument in arguments if _is_override(argument)]
    paths = [argument for argument in arguments if not _is_override(argument)]
    models = {label: _model_config(path, dtype, device) for label, path in _labels(paths).items()}
    flags = _given(tasks=_list(tasks), perplexity=_list(perplexity), limit=limit, batch_size=batch_size)
    with tempfile.TemporaryDirectory(prefix="lors-eval-") as scratch:
        folder = out or Path(scratch) / "eval"
        plan = _stage("eval", models, folder, config, overrides, flags, data_dir, dry_run)
        if plan is None:
            return
        found = {label: run_dir.read_json(folder / f"{label}.json") for label in models}
    views.show_results(found)
    console.result(f"results {out}" if out else "The results are not kept; give --out to keep them.")
    console.document({"results": found, "out": str(out) if out else None})


def _is_override(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace("_", "").replace(".", "").isalnum() and not Path(argument).exists()


def _labels(paths: list[str]) -> dict[str, str]:
    """A short name for each model: the last part of its path, numbered where two are alike."""
    from lors_cli.errors import UsageError

    if not paths:
        raise UsageError("no model is named.", "lors eval MODEL … [key=value …]")
    labels: dict[str, str] = {}
    for path in paths:
        name = Path(path).resolve().name if Path(path).exists() else path.rstrip("/").rpartition("/")[2]
        label = name = name.removesuffix(".gguf")
        number = 2
        while label in labels:
            label, number = f"{name}-{number}", number + 1
        labels[label] = path
    return labels


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _show_record(folder: Path) -> None:
    """The result of prune or tune: its metrics and where it is."""
    from dataclasses import asdict

    from lors_cli import run_dir

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
    from lors_cli import run_dir
    from lors_cli.pipeline import guard_out
    from lors_cli.tuning.adapter import merge as merge_adapter

    guard_out(out, (run_dir.RECORD_NAME, run_dir.STAGING_NAME, ".lock"))
    _model_config(model, dtype, device)
    with run_dir.lock(out):
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
        console.error(f"{document['violations']} violations of {document['pattern']} in {model}.")
        raise typer.Exit(5)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, json_mode: Json = False) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        list_recipes(json_mode=json_mode)


@guarded
def list_recipes() -> None:
    """Names and first comment lines of the shipped recipes."""
    from lors_cli.loading import recipe_summary, shipped_recipes

    found = {name: recipe_summary(path) for name, path in shipped_recipes().items()}
    console.table(["recipe", "what it does"], [[name, summary] for name, summary in found.items()])
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
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from lors_cli.loading import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
@guarded
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write a run's report again."""
    from lors_cli.errors import MissingError
    from lors_cli.report import write_report

    if not (run_folder / "recipe.yaml").is_file():
        raise MissingError(f"{run_folder} is no run folder: it has no recipe.yaml.")
    path = write_report(run_folder)
    console.result(f"report {path}")
    console.document({"report": str(path)})


def main() -> None:
    """Entry point of the `lors` command."""
    app()


if __name__ == "__main__":
    main()
