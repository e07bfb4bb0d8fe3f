"""Figures of stages, a matplotlib figure or None when there is nothing to draw: losses, sparsity, time and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lors_cli.report.drawing import GRID, INK, PALETTE, Look, byte_unit, canvas, figure_of, short, sparsity_map
from lors_cli.report.measures import Group, ScoredModel
from lors_cli.report.results import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 200
"""Of a curve, at most."""
STAGE_COLOURS = {"prune": "#C9B18B", "tune": "#5F7285", "merge": "#8F9779", "pack": "#A98F9B", "eval": "#B4C3CC"}
"""Of every stage that takes time; none of them is a model's."""


def loss_of_run(cell: Cell) -> Figure | None:
    """Training loss by optimiser step, with a running mean when there are many steps."""
    if not cell.log:
        return None
    steps, losses = [row["step"] for row in cell.log], [row["loss"] for row in cell.log]
    figure, axes = figure_of(8, 4)
    window = len(losses) // 20
    if window >= 3:
        axes.plot(steps, losses, color="#9CC3DD", linewidth=1, label="each step")
        axes.plot(steps, _running_mean(losses, window), color=PALETTE["tuned"], linewidth=2.2,
                  label=f"mean of {window} steps")  # fmt: skip
    else:
        few = len(steps) <= 40
        axes.plot(steps, losses, color=PALETTE["tuned"], linewidth=2, marker="o" if few else None, markersize=4,
                  label="training")  # fmt: skip
    if cell.held_out:
        _plot_held_out(axes, cell, INK, "held out")
    if len(axes.lines) > 1:
        axes.legend()
    _finish_loss(axes, "Training loss")
    return figure


def _plot_held_out(axes: Any, cell: Cell, colour: str, label: str) -> None:
    """The loss on held-out samples, dashed."""
    axes.plot([row["step"] for row in cell.held_out], [row["val_loss"] for row in cell.held_out], color=colour,
              linestyle=(0, (4, 2)), linewidth=1.6, marker="o", markersize=3.5, label=label)  # fmt: skip


def loss_of_cells(cells: Sequence[Cell], groups: Sequence[Group]) -> Figure | None:
    """Training loss of every cell by optimiser step, as a running mean, in its tuned model's colour."""
    cells = [cell for cell in cells if cell.log]
    cells = list({cell.folders["tune"]: cell for cell in reversed(cells)}.values())[::-1]
    if not cells:
        return None
    tuned = [model for group in groups for model in group.models if model.role == "tuned"]
    figure, axes = figure_of(9.5, max(4.2, 1.0 + 0.22 * len(cells)))
    for cell in cells:
        model = next((model for model in tuned if cell.name in model.cells), None)
        label, look = (short(model.name), model.look) if model else (short(cell.name), Look())
        window = max(1, len(cell.log) // 10)
        means = _running_mean([row["loss"] for row in cell.log], window)
        every = max(1, math.ceil(len(means) / _POINTS))
        at = sorted({*range(window - 1, len(means), every), len(means) - 1})
        axes.plot(
            [cell.log[index]["step"] for index in at],
            [means[index] for index in at],
            color=look.colour,
            linestyle=look.dashes,
            linewidth=1.8,
            label=label,
        )
        if cell.held_out:
            _plot_held_out(axes, cell, look.colour, f"{label}, held out")
    _finish_loss(axes, "Training loss, mean of a tenth of the steps")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, borderaxespad=0)
    return figure


def _finish_loss(axes: Any, title: str) -> None:
    axes.set(title=title, xlabel="optimiser step", ylabel="cross-entropy (nats per token)")
    axes.grid(axis="y", color=GRID)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over up to `window` values that end at each position."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def sparsity_by_kind(cell: Cell) -> Figure | None:
    """Share of zeros of each pruned linear of a run: decoder blocks across, kinds of linear down."""
    record = next((cell.records[stage] for stage in ("prune", "tune", "merge") if stage in cell.records), None)
    rows: dict[str, dict[int, float]] = {}
    for layer in (record.metrics.get("layers") or []) if record else []:
        block, kind = split_name(layer["name"])
        rows.setdefault(kind, {})[block] = layer["sparsity"]
    return sparsity_map(rows) if rows else None


def sparsity_by_model(groups: Sequence[Group]) -> Figure | None:
    """Share of zeros by decoder block of every pruned model, and of every tuned one that has other shares."""
    rows: dict[str, dict[int, float]] = {}
    for group in groups:
        pruned: dict[int, float] = {}
        for model in group.models:
            shares = _by_block(model)
            if model.role == "pruned":
                pruned = shares
            differs = any(abs(share - pruned.get(block, math.inf)) > 5e-4 for block, share in shares.items())
            if shares and (model.role == "pruned" or differs):
                rows[model.name] = shares
    return sparsity_map(rows) if rows else None


def split_name(name: str) -> tuple[int, str]:
    """A linear's decoder block and kind: `model.layers.3.self_attn.q_proj` is (3, "q_proj"), `x` is (0, "x")."""
    found = re.fullmatch(r".*?\.?(\d+)\.(.+)", name)
    if not found:
        return 0, name
    return int(found.group(1)), re.sub(r"^(self_attn|attn|attention|mlp)\.", "", found.group(2))


def _by_block(model: ScoredModel) -> dict[int, float]:
    """Sparsity of each decoder block over its pruned linears."""
    zeros: dict[int, float] = {}
    weights: dict[int, int] = {}
    for layer in (model.made.metrics.get("layers") or []) if model.made else []:
        block, size = split_name(layer["name"])[0], math.prod(layer["shape"])
        zeros[block] = zeros.get(block, 0.0) + layer["sparsity"] * size
        weights[block] = weights.get(block, 0) + size
    return {block: zeros[block] / weights[block] for block in zeros}


def cost(cells: Sequence[Cell]) -> Figure | None:
    """Time of every cell by stage, and peak memory where it is recorded."""
    cells = [cell for cell in cells if cell.records]
    if not cells:
        return None
    peaks = [max(record.metrics.get("peak_bytes") or 0 for record in cell.records.values()) for cell in cells]
    figure = canvas(11.0 if any(peaks) else 8.0, 1.5 + 0.32 * len(cells))
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.14)
    grid = figure.subplots(1, 2 if any(peaks) else 1, sharey=True, squeeze=False)[0]
    times = {stage: row for stage in STAGE_COLOURS if any(row := [cell.seconds().get(stage, 0.0) for cell in cells])}
    longest = max((sum(row) for row in zip(*times.values(), strict=True)), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    left = [0.0] * len(cells)
    for stage, row in times.items():
        scaled = [value / seconds for value in row]
        grid[0].barh(range(len(cells)), scaled, 0.72, left=left, color=STAGE_COLOURS[stage], label=stage)
        left = [start + value for start, value in zip(left, scaled, strict=True)]
    grid[0].set_yticks(range(len(cells)), [short(cell.label) for cell in cells])
    grid[0].invert_yaxis()
    grid[0].set_title(f"Time ({unit})", pad=26)
    if times:
        grid[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(times), borderaxespad=0.2, fontsize=9)
    if any(peaks):
        name, size = byte_unit(max(peaks))
        grid[1].barh(range(len(cells)), [peak / size for peak in peaks], 0.72, color=STAGE_COLOURS["tune"])
        grid[1].set_title(f"Peak memory ({name})", pad=26)
    for axes in grid:
        axes.grid(axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
    return figure
