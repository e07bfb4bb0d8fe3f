"""`lors inspect`, `bench`, `report` and `doctor`: look at what is there, and measure."""

from __future__ import annotations

from typing import Any

import typer

from lors_cli.cli import options as o
from lors_cli.cli.framework import AROUND, HELP, command
from lors_cli.output import console, progress

look_app = typer.Typer()


@command(look_app, AROUND, "lors inspect sparse", "lors inspect tuned --pattern 2:4 --json")
def inspect(model: o.Model, pattern: o.Against = None) -> None:
    """Show a checkpoint's sparsity; exit 5 when it breaks its pattern."""
    from lors_cli.cli.views.runs import show_inspection
    from lors_cli.models.inspection import inspect as inspect_model
    from lors_cli.models.inspection import prompt_of
    from lors_cli.recipe.loading import load_model_config
    from lors_cli.sparsity import Pattern

    config = load_model_config(model, device="cpu")
    document = inspect_model(config, Pattern.parse(pattern) if pattern else None)
    document["prompt"] = prompt_of(config)
    show_inspection(model, document)
    if document["violations"]:
        console.error(
            f"{document['violations']} violations of {document['pattern']} in {model}.",
            "Something filled zeros after pruning: prune again, or tune and merge with lors.",
        )
        raise typer.Exit(5)


@command(
    look_app, AROUND, "lors bench --blocks 2 --lengths 512 --ranks 16", "lors bench --model sparse --out bench",
    "lors bench --shape llama3-8b --blocks 1 --methods lors,sqft,lora",
    "lors bench --decode --model packed --out bench", flags=o.BENCH,
)  # fmt: skip
def bench(out: o.BenchOut = None, **flags: Any) -> None:
    """Time training steps of all methods, or the decoding of text."""
    from lors_cli.cli.views.bench import run_bench

    run_bench(flags, out)


@command(
    look_app, AROUND, "lors report runs/quickstart", "lors report scores --format html",
    "lors report runs/a runs/b --out a-b",
)  # fmt: skip
def report(folders: o.ReportFolders, formats: o.Formats = None, out: o.ReportOut = None) -> None:
    """Write the report of a run, sweep, eval; compare several."""
    from lors_cli.pipeline.reports import write_reports
    from lors_cli.report.output import FORMATS, check_formats

    chosen = formats or list(FORMATS)
    check_formats(chosen)
    with progress.busy("writing the report"):
        paths = write_reports(folders, chosen, out)
    for path in paths:
        console.path("report", path)
    console.document({"reports": [str(path) for path in paths]})


@command(look_app, HELP, "lors doctor", "lors doctor --json")
def doctor() -> None:
    """Show what this machine has and lacks; exit 3 if lors cannot work."""
    from lors_cli.doctor.examine import document, examine, show

    findings = examine()
    found = document(findings)
    show(findings)
    console.document(found)
    if not found["ok"]:
        raise typer.Exit(3)
