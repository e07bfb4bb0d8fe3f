"""The reports of runs and sweeps, from what the stages left on disk."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lors_cli.errors import UsageError, nearest

FORMATS = ("md", "html", "csv", "tex")


def check_formats(formats: Collection[str]) -> None:
    """Raise UsageError, naming the nearest one, when a format is none of `FORMATS`."""
    for name in formats:
        if name not in FORMATS:
            near = nearest(name, FORMATS, cutoff=0.5)
            hint = f"Did you mean {near}?" if near else None
            raise UsageError(f"--format {name} is none of {', '.join(FORMATS)}.", hint)


def write_report(run: Path, finished: Collection[str] | None = None) -> Path:
    """Write a run's report in every format, as `write_run_report`.

    Returns:
        The path of `report.md`.
    """
    return write_run_report(run, finished)[0]


def write_run_report(
    run: Path, finished: Collection[str] | None = None, formats: Collection[str] = FORMATS
) -> list[Path]:
    """Write a run's reports and `figures/*.png`; the same results give the same bytes.

    Args:
        run: a run folder (DESIGN §4); any stage may be missing.
        finished: the stages whose results belong to the recipe; what others left from earlier settings is not
            shown. None for all that are there.
        formats: of `FORMATS`, those to write.

    Returns:
        The reports' paths, in the order of `FORMATS`.

    Raises:
        UsageError: the folder holds no run.
    """
    from lors_cli.output.markdown import escape
    from lors_cli.report.figures import FIGURES
    from lors_cli.report.markdown import run_blocks
    from lors_cli.report.output import write_files
    from lors_cli.report.results import models, read_run

    if not run.is_dir():
        raise UsageError(f"{run} is no folder.", "Give the folder of a run, such as runs/quickstart.")
    results = read_run(run, finished)
    if not results.recipe_text and not results.records and not results.scores:
        raise UsageError(f"{run} holds no run.", "Give the folder of a run, such as runs/quickstart.")
    group = models(results)
    return write_files(
        run, formats, figures=FIGURES, view=results, blocks=lambda drawn: run_blocks(results, drawn),
        groups=[group] if group.models else [], caption=f"{escape(group.title)}.",
    )  # fmt: skip
