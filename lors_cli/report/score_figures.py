"""Figures of scores, a matplotlib figure or None when there is nothing to draw: bars by task for the few models of a
run, a panel a task for the many of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lors_cli.models.sources import short_name
from lors_cli.report.drawing import GRID, INK, PAGE, PALETTE, canvas, figure_of, plain_ticks, short
from lors_cli.report.measures import Group, Measure, ScoredModel, measures
from lors_cli.report.paper import TASKS
from lors_cli.report.scores import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_bars(group: Group) -> Figure | None:
    """Zero-shot accuracy of each model and task, with standard errors where they are known."""
    found = _drawable(group, first=())
    tasks = [item for item in found if item.kind == "task" and item.metric == "acc"]
    average = [item for item in found if item.kind == "average" and len(tasks) > 1]
    labels = [TASKS.get(item.name, item.name) for item in tasks] + ["average"] * len(average)
    return _bars(group, tasks + average, labels, "Zero-shot accuracy", "accuracy (%)", top=100) if tasks else None


def perplexity_bars(group: Group) -> Figure | None:
    """Perplexity of each model and text."""
    texts = [item for item in _drawable(group) if item.kind == "perplexity"]
    labels = [item.name for item in texts]
    return _bars(group, texts, labels, "Perplexity (lower is better)", "perplexity per token") if texts else None


def _drawable(group: Group, **order: Any) -> list[Measure]:
    """What any of the models has a finite number for."""
    found = measures(group.models, **order)
    return [item for item in found if any(item.stored(model) is not None for model in group.models)]


def _bars(
    group: Group, items: list[Measure], labels: list[str], title: str, unit: str, *, top: float = math.inf
) -> Figure:
    """Groups of bars, one colour a model, each with its value on top."""
    num_models = len(group.models)
    figure, axes = figure_of(max(5.0, min(15.0, 1.8 + 0.42 * len(labels) * (num_models + 0.8))), 4.2)
    width = 0.8 / num_models
    values = {model.role: [_or_nan(item.value(model)) for item in items] for model in group.models}
    finite = [value for row in values.values() for value in row if math.isfinite(value)]
    digits = 1 if max(finite) < 1000 else 0
    is_log = top == math.inf and max(finite) > 20 * min(finite) > 0
    for index, model in enumerate(group.models):
        row = values[model.role]
        at = [place + (index - (num_models - 1) / 2) * width for place in range(len(labels))]
        bars = axes.bar(at, row, width * 0.92, label=model.role, color=PALETTE[model.role])
        spread = [_or_nan(item.stderr(model) if item.kind == "task" else None) for item in items]
        if any(map(math.isfinite, spread)):
            axes.errorbar(at, row, yerr=spread, fmt="none", ecolor=INK, elinewidth=1)
        for bar, value, error in zip(bars, row, spread, strict=True):
            if math.isfinite(value):
                end = (bar.get_x() + bar.get_width() / 2, value + (error if math.isfinite(error) else 0))
                axes.annotate(f"{value:.{digits}f}", end, (0, 2), textcoords="offset points", ha="center", va="bottom",
                              fontsize=8)  # fmt: skip
    if is_log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.set_ylim(top=max(finite) * 2)
    else:
        axes.set_ylim(0, min(top, max(finite) * 1.15))
    axes.set(ylabel=f"{unit}, log scale" if is_log else unit)
    is_crowded = 0.1 * max(map(len, labels)) > figure.get_figwidth() / len(labels)
    axes.set_xticks(range(len(labels)), labels, rotation=20 if is_crowded else 0,
                    ha="right" if is_crowded else "center")  # fmt: skip
    axes.set_title(title, pad=30)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=num_models, borderaxespad=0.2, handlelength=1.2,
                columnspacing=1.4)  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID)
    return figure


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def accuracy_panels(groups: Sequence[Group]) -> Figure | None:
    """Accuracy of every model, the average first, with standard errors and the paper's figures."""
    found = measures(model for group in groups for model in group.models)
    shown = [item for item in found if item.kind == "average"]
    shown += [item for item in found if item.kind == "task" and item.metric == "acc"]
    return _panels(groups, {item: "Average accuracy" if item.kind == "average" else item.title for item in shown},
                   "accuracy (%)")  # fmt: skip


def perplexity_panels(groups: Sequence[Group]) -> Figure | None:
    """Perplexity of every model by text."""
    found = [item for item in measures(m for group in groups for m in group.models) if item.kind == "perplexity"]
    return _panels(groups, {item: short_name(item.name) for item in found}, "perplexity per token, lower is better")


def _panels(groups: Sequence[Group], titles: Mapping[Measure, str], unit: str) -> Figure | None:
    """Horizontal bars, a panel a measure, four beside each other."""
    rows = _rows(groups, list(titles))
    shown = [item for item in titles if any(item.value(model) is not None for _, model in rows)]
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
        name = titles[item]
        axes.set_title(f"{name}, log scale" if axes.get_xscale() == "log" else name, fontsize=11, pad=6)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    grid[0][0].set_yticks([place for place, _ in rows], [short(model.label) for _, model in rows])
    grid[0][0].set_ylim(rows[-1][0] + 0.7, -0.7)
    if len(shown) == 1:
        grid[0][0].set_xlabel(unit, fontsize=10)
    else:
        figure.supxlabel(unit, fontsize=10)
    handles = [handle for axes in grid.flat for handle in axes.collections if handle.get_label() == "the paper's"]
    if handles:
        figure.legend(handles=handles[:1], loc="outside upper right", fontsize=10)
    return figure


def _rows(groups: Sequence[Group], shown: Sequence[Measure]) -> list[tuple[float, ScoredModel]]:
    """The models that have any of these numbers, from top to bottom with their place; groups stand apart."""
    place, found = 0.0, []
    for group in groups:
        models = [model for model in group.models if any(item.value(model) is not None for item in shown)]
        found += [(place + index, model) for index, model in enumerate(models)]
        place += len(models) + (0.5 if models else 0)
    return found


def _panel(axes: Any, item: Measure, rows: Sequence[tuple[float, ScoredModel]]) -> None:
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
