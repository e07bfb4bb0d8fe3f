"""The report of a sweep: its cells beside each other and beside the LoRS paper, as Markdown, HTML, CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from lors_cli.output.console import gib
from lors_cli.output.markdown import NONE, Block, Code, Figure, escape, table
from lors_cli.output.progress import duration
from lors_cli.report import FORMATS
from lors_cli.report.comparison import notes, results_table
from lors_cli.report.measures import Group
from lors_cli.report.output import write_files
from lors_cli.report.sweep_results import SweepCell, SweepResults, groups, read_sweep, stage_seconds

_FIGURE_TEXTS = {
    "accuracy": "Zero-shot accuracy; lines are standard errors.",
    "perplexity": "Perplexity by text.",
    "loss": "Training loss of every cell.",
    "sparsity": "Sparsity by decoder block of the pruned models, and of tuned ones that have not kept it.",
    "cost": "Time of every cell; a stage that cells share counts in each of them.",
}


def write_sweep_report(sweep_folder: Path, formats: Collection[str] = FORMATS) -> list[Path]:
    """Write a sweep's reports and `figures/*.png`; the same results give the same bytes.

    Args:
        sweep_folder: with `sweep.json`; cells may be pending or failed.
        formats: of `FORMATS`, those to write.

    Returns:
        The reports' paths, in the order of `FORMATS`.

    Raises:
        UsageError: the folder holds no sweep.
    """
    from lors_cli.report.sweep_figures import FIGURES, SweepView

    sweep = read_sweep(sweep_folder)
    found = groups(sweep)
    return write_files(
        sweep_folder, formats, figures=FIGURES, view=SweepView(sweep, found),
        blocks=lambda drawn: sweep_blocks(sweep, found, drawn), groups=found, caption=f"Sweep {escape(sweep.name)}.",
    )  # fmt: skip


def sweep_blocks(sweep: SweepResults, found: Sequence[Group], drawn: Collection[str]) -> list[Block]:
    """The whole report.

    Args:
        sweep: as read.
        found: its models in groups.
        drawn: names of the drawn figures.
    """
    scored = any(model.scores for group in found for model in group.models)
    results: list[Block] = ["## Results", results_table(found), *notes(found)]
    settings: list[Block] = ["## Settings", Code(sweep.text, "yaml")]
    return [
        f"# {escape(sweep.name)}",
        *_summary(sweep),
        *(results if found else []),
        *_figures(("accuracy", "perplexity") if scored else (), drawn),
        *_unfinished(sweep),
        *_section("## Tuning", _figures(("loss",), drawn)),
        *_section("## Sparsity and cost", [*_cost(sweep), *_figures(("sparsity", "cost"), drawn)]),
        *(settings if sweep.text else []),
    ]


def _section(heading: str, blocks: list[Block]) -> list[Block]:
    return [heading, *blocks] if blocks else []


def _summary(sweep: SweepResults) -> list[Block]:
    """What varies, and how far it got."""
    counts = Counter(cell.status for cell in sweep.cells)
    states = [f"{counts[status]} {status}" for status in ("done", "running", "failed", "pending") if counts[status]]
    cells = f"{len(sweep.cells)} cells" if len(sweep.cells) != 1 else "1 cell"
    axes = [f"{name}: {', '.join(map(str, values))}" for name, values in sweep.axes.items()]
    first = f"{cells}: {', '.join(states)}." if states else "No cell."
    return [first, f"Varied: {escape('; '.join(axes))}."] if axes else [first]


def _unfinished(sweep: SweepResults) -> list[Block]:
    rows = [
        [cell.name, cell.status, ", ".join(cell.records) or NONE, cell.error or NONE]
        for cell in sweep.cells
        if cell.status != "done"
    ]
    if not rows:
        return []
    return ["## Not finished", table(["cell", "status", "stages done", "error"], rows, prose=True)]


def _cost(sweep: SweepResults) -> list[Block]:
    """Time, speed, size and sparsity of every cell that has finished a stage."""
    rows = [[cell.name, *_cost_cells(cell)] for cell in sweep.cells if cell.records]
    if not rows:
        return []
    columns = ["cell", "prune", "tune", "eval", "tokens/s", "steps", "loss, first", "loss, last",
               "trainable parameters", "pattern", "sparsity", "violations", "peak memory"]  # fmt: skip
    kept = [index for index in range(len(columns)) if any(row[index] != NONE for row in rows)]
    total = sum(_distinct_seconds(sweep).values())
    return [
        table([columns[index] for index in kept], [[row[index] for index in kept] for row in rows]),
        f"All stages together took {duration(total)}; in the table one that cells share counts in each of them.",
    ]


def _cost_cells(cell: SweepCell) -> list[str]:
    seconds = stage_seconds(cell)
    tune = cell.records["tune"].metrics if "tune" in cell.records else {}
    last = tune or next(iter(cell.records.values())).metrics
    peaks = [record.metrics["peak_bytes"] for record in cell.records.values() if record.metrics.get("peak_bytes")]
    return [
        *(duration(seconds[stage]) if stage in seconds else NONE for stage in ("prune", "tune", "eval")),
        f"{tune['tokens_per_s']:,.0f}" if tune.get("tokens_per_s") else NONE,
        str(tune.get("steps", NONE)),
        *(f"{tune[name]:.4f}" if tune.get(name) is not None else NONE for name in ("first_loss", "last_loss")),
        f"{tune['trainable_parameters']:,}" if tune.get("trainable_parameters") else NONE,
        str(last.get("pattern", NONE)),
        f"{last['sparsity']:.4f}" if "sparsity" in last else NONE,
        str(last.get("violations", NONE)),
        gib(max(peaks)) if peaks else NONE,
    ]


def _distinct_seconds(sweep: SweepResults) -> dict[str, float]:
    """Seconds of every stage folder, each once."""
    found = {}
    for cell in sweep.cells:
        found.update({cell.folders[stage]: record.elapsed_s for stage, record in cell.records.items()})
        found.update({item.folder: item.record.elapsed_s for item in cell.scores.values() if item.record})
    return found


def _figures(names: Sequence[str], drawn: Collection[str]) -> list[Block]:
    return [Figure(name, _FIGURE_TEXTS[name]) for name in names if name in drawn]
