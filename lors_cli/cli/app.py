"""The `lors` command: where its panels of commands come together."""

from __future__ import annotations

import os

import typer

from lors_cli.cli import options as o
from lors_cli.cli.data import data_app
from lors_cli.cli.framework import AROUND, HELP, Commands
from lors_cli.cli.look import look_app
from lors_cli.cli.pipelines import pipelines_app
from lors_cli.cli.recipes import recipes_app
from lors_cli.cli.share import share_app
from lors_cli.cli.stages import stages_app
from lors_cli.cli.talk import talk_app
from lors_cli.machine import processes

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
for panel in (pipelines_app, stages_app, talk_app, look_app):
    app.add_typer(panel)
app.add_typer(data_app, name="data", rich_help_panel=AROUND)
app.add_typer(share_app)
app.add_typer(recipes_app, name="recipes", rich_help_panel=HELP)


@app.callback(epilog=FIRST_STEPS)
def lors(version: o.Version = False) -> None:
    """Prune, tune and evaluate sparse language models."""


def main() -> None:
    """Entry point of the `lors` command."""
    if processes.LAUNCHER in os.environ:
        from lors_cli.cli.launch import die_with_launcher

        die_with_launcher()
    app()
