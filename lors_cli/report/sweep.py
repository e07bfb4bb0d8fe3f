"""The report of a sweep: its cells beside each other and beside the LoRS paper, as Markdown, HTML, CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from lors_cli.output.console import gib
from lors_cli.output.markdown import NONE, Block, Code, escape, table
from lors_cli.output.progress import duration
from lors_cli.report.groups import groups
from lors_cli.report.measures import Group
from lors_cli.report.output import FORMATS, assemble, pictures, table_of, write_files
from lors_cli.report.results import Cell, Results, read_sweep
from lors_cli.report.score_figures import accuracy_panels, perplexity_panels
from lors_cli.report.scores import by_model, notes
from lors_cli.report.stage_figures import STAGE_COLOURS, cost, loss_of_cells, sparsity_by_model

OF_SCORES = {
    "accuracy": "Accuracy; lines are standard errors, dashes what guessing gives.",
    "perplexity": "Perplexity by text.",
}
OF_COST = {
    "sparsity": "Sparsity by decoder block of the pruned models, and of tuned ones that have not kept it.",
    "cost": "Time of every cell; a stage that cells share counts in each of them.",
}


def write_sweep_report(sweep_folder: Path, formats: Collection[str] = FORMATS, out: Path | None = None) -> list[Path]:
    """Write a sweep's reports and `figures/*.png`; the same results give the same bytes; cells may be unfinished.

    Args:
        out: where the reports go, None for the sweep's folder.

    Raises:
        UsageError: the folder holds no sweep.
    """
    sweep = read_sweep(sweep_folder)
    found = groups(sweep)
    figures = {
        "accuracy": lambda: accuracy_panels(found), "perplexity": lambda: perplexity_panels(found),
        "loss": lambda: loss_of_cells(sweep.cells, found), "sparsity": lambda: sparsity_by_model(found),
        "cost": lambda: cost(sweep.cells),
    }  # fmt: skip
    return write_files(
        out or sweep_folder, formats, figures=figures, blocks=lambda drawn: sweep_blocks(sweep, found, drawn),
        groups=found, caption=f"Sweep {escape(sweep.name)}.",
    )  # fmt: skip


def sweep_blocks(sweep: Results, found: Sequence[Group], drawn: Collection[str]) -> list[Block]:
    """The whole report: the models in groups, and the figures of which `drawn` has the names."""
    unfinished = [
        [cell.name, cell.status, ", ".join(cell.records) or NONE, cell.error or NONE]
        for cell in _last(sweep)
        if cell.status != "done"
    ]
    return assemble(sweep.name, _summary(sweep), {
        "Results": [by_model(found), *notes(found), *pictures(OF_SCORES, drawn)] if found else [],
        "Not finished": table_of(["cell", "status", "stages done", "error"], unfinished, prose=True),
        "Tuning": pictures({"loss": "Training loss of every cell."}, drawn),
        "Sparsity and cost": [*cost_table(sweep.cells), *pictures(OF_COST, drawn)],
        "Settings": [*([_OF_EARLIER] if _num_kept(sweep) else []), Code(sweep.text, "yaml")] if sweep.text else [],
    })  # fmt: skip


_OF_EARLIER = "These are the earlier settings; what the last ones change is in `sweep.json`, under `overrides`."


def _last(sweep: Results) -> list[Cell]:
    """The cells with the sweep's last settings."""
    return [cell.unfinished or cell for cell in sweep.cells]


def _num_kept(sweep: Results) -> int:
    """How many cells are shown as earlier settings have left them."""
    return sum(cell.unfinished is not None for cell in sweep.cells)


def _summary(sweep: Results) -> list[Block]:
    """What varies, and how far it got."""
    counts = Counter(cell.status for cell in _last(sweep))
    states = [f"{counts[status]} {status}" for status in ("done", "running", "failed", "pending") if counts[status]]
    cells = f"{len(sweep.cells)} cells" if len(sweep.cells) != 1 else "1 cell"
    axes = [f"{name}: {', '.join(map(str, values))}" for name, values in sweep.axes.items()]
    first = f"{cells}: {', '.join(states)}." if states else "No cell."
    if kept := _num_kept(sweep):
        first += f" Earlier settings had finished {kept} of those that are not done; these results are shown apart."
    return [first, f"Varied: {escape('; '.join(axes))}."] if axes else [first]


def cost_table(cells: Sequence[Cell]) -> list[Block]:
    """Time, speed, size and sparsity of every cell that has finished a stage."""
    rows = [[cell.label, *_cost_cells(cell)] for cell in cells if cell.records]
    if not rows:
        return []
    columns = ["cell", *STAGE_COLOURS, "tokens/s", "steps", "loss before", "loss after",
               "trainable parameters", "pattern", "sparsity", "violations", "peak memory"]  # fmt: skip
    kept = [index for index in range(len(columns)) if any(row[index] != NONE for row in rows)]
    seconds = {}  # of every stage folder, each once
    for cell in cells:
        seconds.update({cell.folders[stage]: record.elapsed_s for stage, record in cell.records.items()})
        seconds.update({item.folder: item.elapsed_s for item in cell.scores.values() if item.elapsed_s is not None})
    return [
        table([columns[index] for index in kept], [[row[index] for index in kept] for row in rows]),
        f"All stages together took {duration(sum(seconds.values()))}; in the table one that cells share counts in each "
        "of them.",
    ]


def _cost_cells(cell: Cell) -> list[str]:
    seconds = cell.seconds()
    tune = cell.records["tune"].metrics if "tune" in cell.records else {}
    last = tune or next(iter(cell.records.values())).metrics
    peaks = [record.metrics["peak_bytes"] for record in cell.records.values() if record.metrics.get("peak_bytes")]
    return [
        *(duration(seconds[stage]) if stage in seconds else NONE for stage in STAGE_COLOURS),
        f"{tune['tokens_per_s']:,.0f}" if tune.get("tokens_per_s") else NONE,
        str(tune.get("steps", NONE)),
        *(f"{tune[name]:.4f}" if tune.get(name) is not None else NONE for name in ("loss_before", "loss_after")),
        f"{tune['trainable_parameters']:,}" if tune.get("trainable_parameters") else NONE,
        str(last.get("pattern", NONE)),
        f"{last['sparsity']:.4f}" if "sparsity" in last else NONE,
        str(last.get("violations", NONE)),
        gib(max(peaks)) if peaks else NONE,
    ]
