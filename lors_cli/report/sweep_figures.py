"""A sweep's figures: each a function from its results to a matplotlib figure, or None when there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.models.sources import short_name
from lors_cli.report.comparison import number
from lors_cli.report.drawing import (
    GRID,
    INK,
    METHOD_COLOURS,
    PAGE,
    PALETTE,
    canvas,
    figure_of,
    plain_ticks,
    short,
    sparsity_map,
)
from lors_cli.report.figures import running_mean, split_name
from lors_cli.report.measures import Group, Measure, ScoredModel, measures
from lors_cli.report.sweep_results import SweepCell, SweepResults, stage_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CYCLE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6BB1", "#7F7F7F")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_POINTS = 200
"""Of a curve, at most."""
_STAGE_COLOURS = {"prune": "#E69F00", "tune": "#0072B2", "eval": "#999999"}


@dataclass(frozen=True)
class SweepView:
    """What the figures draw."""

    sweep: SweepResults
    groups: Sequence[Group]

    def models(self) -> list[ScoredModel]:
        """Those that have scores."""
        return [model for group in self.groups for model in group.models if model.scores]

    def rows(self, shown: Sequence[Measure]) -> list[tuple[float, ScoredModel]]:
        """The models that have any of these numbers, from top to bottom with their place; groups stand apart."""
        place, found = 0.0, []
        for group in self.groups:
            models = [model for model in group.models if any(item.value(model) is not None for item in shown)]
            for model in models:
                found.append((place, model))
                place += 1
            place += 0.5 if models else 0
        return found

    def label(self, cell: SweepCell) -> str:
        """Of the cell's tuned model."""
        models = [model for group in self.groups for model in group.models]
        return next((model.label for model in models if model.role == "tuned" and cell.name in model.cells), cell.name)


def accuracy(view: SweepView) -> Figure | None:
    """Accuracy of every model, the average first, with standard errors and the paper's figures."""
    found = measures(view.models())
    shown = [item for item in found if item.kind == "average"]
    shown += [item for item in found if item.kind == "task" and item.metric == "acc"]
    return _panels(view, shown, "accuracy (%)", {"average": "Average accuracy"})


def perplexity(view: SweepView) -> Figure | None:
    """Perplexity of every model by text."""
    shown = [item for item in measures(view.models()) if item.kind == "perplexity"]
    return _panels(view, shown, "perplexity per token, lower is better", {})


def _panels(view: SweepView, shown: list[Measure], unit: str, titles: dict[str, str]) -> Figure | None:
    """Horizontal bars, a panel a measure, four beside each other; `titles` is by kind of measure."""
    rows = view.rows(shown)
    shown = [item for item in shown if any(item.value(model) is not None for _, model in rows)]
    if not shown:
        return None
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    longest = max(len(short(model.label)) for _, model in rows)
    width = min(16.0, 0.6 + 0.085 * longest + max(2.6 * across, 5.0))
    figure = canvas(width, down * (0.85 + 0.27 * (rows[-1][0] + 1)))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, item in zip(grid.flat, shown, strict=False):
        _panel(axes, item, rows)
        name = titles.get(item.kind, short_name(item.name) if item.kind == "perplexity" else item.title)
        axes.set_title(f"{name}, log scale" if axes.get_xscale() == "log" else name, fontsize=11, pad=6)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    grid[0][0].set_yticks([place for place, _ in rows], [short(model.label) for _, model in rows])
    grid[0][0].set_ylim(rows[-1][0] + 0.7, -0.7)
    if len(shown) == 1:
        grid[0][0].set_xlabel(unit, fontsize=10)
    else:
        figure.supxlabel(unit, fontsize=10)
    if any(item.paper(model) is not None for item in shown for _, model in rows):
        handles = [handle for axes in grid.flat for handle in axes.collections if handle.get_label() == "the paper's"]
        figure.legend(handles=handles[:1], loc="outside upper right", fontsize=10)
    return figure


def _panel(axes: Any, item: Measure, rows: list[tuple[float, ScoredModel]]) -> None:
    found = [(place, model, value) for place, model in rows if (value := item.value(model)) is not None]
    values = [value for _, _, value in found]
    is_log = item.kind == "perplexity" and max(values) > 20 * min(values) > 0
    axes.barh([place for place, _, _ in found], values, 0.78, color=[PALETTE[model.role] for _, model, _ in found])
    ends = []
    for place, model, value in found:
        error = item.stderr(model) or 0.0
        if error:
            axes.errorbar(value, place, xerr=error, fmt="none", ecolor=INK, elinewidth=1)
        ends.append(max(value + error, item.paper(model) or 0.0))
        axes.text(1.02, place, number(item, value), transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    papers = [(paper, place) for place, model, _ in found if (paper := item.paper(model)) is not None]
    if papers:
        axes.scatter(*zip(*papers, strict=True), s=26, marker="D", facecolor=PAGE, edgecolor=INK, linewidth=1.1,
                     zorder=3, label="the paper's")  # fmt: skip
    if is_log:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_xlim(min(values) / 2, max(ends) * 1.1)
    else:
        axes.set_xlim(0, max(ends) * 1.05)
        axes.xaxis.get_major_locator().set_params(nbins=4)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID)


def loss(view: SweepView) -> Figure | None:
    """Training loss of every cell by optimiser step, as a running mean."""
    cells = [cell for cell in view.sweep.cells if cell.log]
    cells = list({cell.folders["tune"]: cell for cell in reversed(cells)}.values())[::-1]
    if not cells:
        return None
    figure, axes = figure_of(9.5, max(4.2, 1.0 + 0.22 * len(cells)))
    for cell, (colour, dashes) in zip(cells, _line_styles(cells), strict=True):
        window = max(1, len(cell.log) // 10)
        means = running_mean([row["loss"] for row in cell.log], window)
        every = max(1, math.ceil(len(means) / _POINTS))
        at = sorted({*range(window - 1, len(means), every), len(means) - 1})
        axes.plot([cell.log[index]["step"] for index in at], [means[index] for index in at], color=colour,
                  linestyle=dashes, linewidth=1.8, label=short(view.label(cell)))  # fmt: skip
    axes.set(title="Training loss, mean of a tenth of the steps", xlabel="optimiser step",
             ylabel="cross-entropy (nats per token)")  # fmt: skip
    axes.grid(axis="y", color=GRID)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, borderaxespad=0)
    return figure


def _line_styles(cells: list[SweepCell]) -> list[tuple[str, Any]]:
    """Colour and dashes of each curve: a method's colour and a pruner's dashes where that tells them apart."""
    origins = list(dict.fromkeys(cell.folders.get("prune") for cell in cells))
    methods = [str(cell.config("tune").get("method")) for cell in cells]
    pairs = [(method, cell.folders.get("prune")) for method, cell in zip(methods, cells, strict=True)]
    if len(set(pairs)) == len(pairs) and len(origins) <= len(_DASHES) and set(methods) <= METHOD_COLOURS.keys():
        return [(METHOD_COLOURS[method], _DASHES[origins.index(origin)]) for method, origin in pairs]
    return [(_CYCLE[i % len(_CYCLE)], _DASHES[i // len(_CYCLE) % len(_DASHES)]) for i in range(len(cells))]


def sparsity(view: SweepView) -> Figure | None:
    """Share of zeros by decoder block of every pruned model, and of every tuned one that has other shares."""
    rows: dict[str, dict[int, float]] = {}
    for group in view.groups:
        pruned: dict[int, float] = {}
        for model in group.models:
            shares = _by_block(model)
            if model.role == "pruned":
                pruned = shares
            if shares and (model.role == "pruned" or _differ(shares, pruned)):
                prefix = f"{group.title}: " if len(view.groups) > 2 and model.label in rows else ""
                rows[prefix + model.label] = shares
    return sparsity_map(rows) if rows else None


def _by_block(model: ScoredModel) -> dict[int, float]:
    """Sparsity of each decoder block over its pruned linears."""
    zeros: dict[int, float] = {}
    weights: dict[int, int] = {}
    for layer in (model.made.metrics.get("layers") or []) if model.made else []:
        block, size = split_name(layer["name"])[0], math.prod(layer["shape"])
        zeros[block] = zeros.get(block, 0.0) + layer["sparsity"] * size
        weights[block] = weights.get(block, 0) + size
    return {block: zeros[block] / weights[block] for block in zeros}


def _differ(shares: dict[int, float], others: dict[int, float]) -> bool:
    return any(abs(share - others.get(block, math.inf)) > 5e-4 for block, share in shares.items())


def cost(view: SweepView) -> Figure | None:
    """Time of every cell by stage, and peak memory where it is recorded."""
    cells = [cell for cell in view.sweep.cells if cell.records]
    if not cells:
        return None
    peaks = [[(record.metrics.get("peak_bytes") or 0) / 2**30 for record in cell.records.values()] for cell in cells]
    with_memory = any(map(any, peaks))
    figure = canvas(11.0 if with_memory else 8.0, 1.5 + 0.32 * len(cells))
    grid = figure.subplots(1, 2 if with_memory else 1, sharey=True, squeeze=False)[0]
    times = {stage: [stage_seconds(cell).get(stage, 0.0) for cell in cells] for stage in _STAGE_COLOURS}
    longest = max(sum(row) for row in zip(*times.values(), strict=True))
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    left = [0.0] * len(cells)
    for stage, row in times.items():
        scaled = [value / seconds for value in row]
        grid[0].barh(range(len(cells)), scaled, 0.72, left=left, color=_STAGE_COLOURS[stage], label=stage)
        left = [start + value for start, value in zip(left, scaled, strict=True)]
    grid[0].set_yticks(range(len(cells)), [short(cell.name) for cell in cells])
    grid[0].invert_yaxis()
    grid[0].set_title(f"Time ({unit})", pad=26)
    grid[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, borderaxespad=0.2, fontsize=9)
    if with_memory:
        grid[1].barh(range(len(cells)), [max(row) for row in peaks], 0.72, color=PALETTE["tuned"])
        grid[1].set_title("Peak memory (GiB)", pad=26)
    for axes in grid:
        axes.grid(axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
    return figure


FIGURES: dict[str, Callable[[SweepView], Figure | None]] = {
    "accuracy": accuracy, "perplexity": perplexity, "loss": loss, "sparsity": sparsity, "cost": cost,
}  # fmt: skip
