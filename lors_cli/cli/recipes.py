"""`lors recipes` and its commands: list the shipped recipes, copy one, look up settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from lors_cli.cli import options as o
from lors_cli.cli.framework import Group, command, guarded
from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.output import console
from lors_cli.recipe.shipped import find_shipped_recipe, recipe_summary, shipped_files

COMMANDS = "Commands"
recipes_app = typer.Typer(cls=Group, pretty_exceptions_enable=False)


@recipes_app.callback(invoke_without_command=True)
def recipes(
    context: typer.Context, json_mode: o.Json = False, quiet: o.Quiet = False, verbose: o.Verbose = 0
) -> None:  # fmt: skip
    """List the shipped recipes and sweeps, copy one, look up a setting."""
    given = {"json_mode": json_mode, "quiet": quiet, "verbose": verbose}
    if context.invoked_subcommand is None:
        list_shipped(**given)
    else:  # it has the same options, and these are their defaults
        context.default_map = {context.invoked_subcommand: given}


@guarded
def list_shipped() -> None:
    """Names and first comment lines of the shipped recipes and sweeps."""
    found = []
    for kind, files in (("recipe", shipped_files("recipe")), ("sweep", shipped_files("sweep"))):
        mine = [{"name": name, "kind": kind, "summary": recipe_summary(path)} for name, path in files.items()]
        console.table([kind, "what it does"], [[item["name"], item["summary"]] for item in mine], prose=True)
        console.result()
        found += mine
    console.result("lors recipes copy NAME writes one here to edit; lors run RECIPE or lors sweep SWEEP runs it.")
    console.document(found)


@command(recipes_app, COMMANDS, "lors recipes copy quickstart", "lors recipes copy llama3-8b-2of4 mine.yaml")
def copy(name: o.Shipped, target: o.Target = None) -> None:
    """Write a shipped recipe or sweep here, to edit and run."""
    source = find_shipped_recipe(name)
    path = target or Path(source.name)
    path = path / source.name if path.is_dir() else path
    if path.exists():
        raise UsageError(f"{path} is there already; it is not overwritten.", "Name another file.")
    atomic.write_bytes(path, source.read_bytes())
    runner = "sweep" if source in shipped_files("sweep").values() else "run"
    console.result(f"wrote {path}; run it with: lors {runner} {path}")
    console.document({"wrote": str(path)})


@command(recipes_app, COMMANDS, "lors recipes schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from lors_cli.recipe.loading import recipe_schema

    if console.is_json():
        console.document(recipe_schema())
    else:
        typer.echo(json.dumps(recipe_schema(), indent=2))


@command(recipes_app, COMMANDS, "lors recipes reference | less", "lors recipes reference --json")
def reference() -> None:
    """Print every setting with its values and default, as Markdown."""
    from lors_cli.recipe.reference import markdown, settings

    if console.is_json():
        console.document([asdict(setting) for setting in settings()])
    else:
        typer.echo(markdown(), nl=False)
