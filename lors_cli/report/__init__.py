"""The report of a run: `report.md` and its figures, from what the stages left on disk."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lors_cli import run_dir
from lors_cli.errors import UsageError


def write_report(run: Path, finished: Collection[str] | None = None) -> Path:
    """Write `report.md` and `figures/*.png` of a run; the same results give the same bytes.

    Args:
        run: a run folder (DESIGN §4); any stage may be missing.
        finished: the stages whose results belong to the recipe; what others left from earlier settings is not
            shown. None for all that are there.

    Returns:
        The report's path.

    Raises:
        UsageError: the folder holds no run.
    """
    from lors_cli.report.figures import FIGURES
    from lors_cli.report.markdown import render
    from lors_cli.report.results import read_run

    if not run.is_dir():
        raise UsageError(f"{run} is no folder.", "Give the folder of a run, such as runs/quickstart.")
    results = read_run(run, finished)
    if not results.recipe_text and not results.records and not results.scores:
        raise UsageError(f"{run} holds no run.", "Give the folder of a run, such as runs/quickstart.")
    drawn = []
    for name, draw in FIGURES.items():
        path = run / "figures" / f"{name}.png"
        image = draw(results)
        if image is None:
            path.unlink(missing_ok=True)  # left by an earlier recipe in the same folder
            continue
        if not path.is_file() or path.read_bytes() != image:
            run_dir.write_bytes(path, image)
        drawn.append(name)
    report = run / "report.md"
    run_dir.write_text(report, render(results, drawn))
    return report
