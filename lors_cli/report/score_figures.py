"""Figures of scores, a matplotlib figure or None when there is nothing to draw: bars by task for the few models of a
run, a panel a task for the many of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lors_cli.models.sources import short_name
from lors_cli.report.drawing import GRID, INK, PAGE, canvas, figure_of, plain_ticks, short
from lors_cli.report.measures import Group, Measure, ScoredModel, measures
from lors_cli.report.paper import TASKS
from lors_cli.report.scores import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PAPER, _CHANCE_LABEL = "the paper's", "guessing"
_CHANCE: dict[str, Any] = {"colors": "#C1272D", "linestyles": (0, (3, 2)), "linewidth": 1.1, "zorder": 2.5}
_CROWD = 48
"""Bars that one figure can hold beside each other."""


def accuracy_bars(group: Group) -> Figure | None:
    """Accuracy of each model and task, acc_norm beside acc, with standard errors and what guessing gives."""
    found = _drawable(group, every_metric=True, first=())
    tasks = [item for item in found if item.kind == "task" and item.is_percent]
    average = [item for item in found if item.kind == "average" and len(tasks) > 1]
    items = [*tasks, *average]
    if len(items) * len(group.models) > _CROWD:
        return accuracy_panels([group])
    labels = [_task_label(item, tasks) for item in tasks] + ["average"] * len(average)
    return _bars(group, items, labels, "Accuracy", "accuracy (%)", top=100) if tasks else None


def _task_label(item: Measure, tasks: Sequence[Measure]) -> str:
    """The task's name, and the metric below it where there are two."""
    name = TASKS.get(item.name, item.name)
    return f"{name}\n{item.metric}" if sum(other.name == item.name for other in tasks) > 1 else name


def perplexity_bars(group: Group) -> Figure | None:
    """Perplexity of each model and text."""
    texts = [item for item in _drawable(group) if item.kind == "perplexity"]
    if len(texts) * len(group.models) > _CROWD:
        return perplexity_panels([group])
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
    figure, axes = figure_of(max(5.0, min(16.0, 1.8 + 0.38 * len(labels) * (num_models + 0.8))), 4.2)
    width = 0.8 / num_models
    values = [[_or_nan(item.value(model)) for item in items] for model in group.models]
    errors = [[item.stderr(model) or 0.0 for item in items] for model in group.models]
    finite = [value for row in values for value in row if math.isfinite(value)]
    digits = 1 if max(finite) < 1000 else 0
    is_log = top == math.inf and max(finite) > 20 * min(finite) > 0
    for index, (name, model) in enumerate(zip(_names(group), group.models, strict=True)):
        at = [place + (index - (num_models - 1) / 2) * width for place in range(len(labels))]
        axes.bar(at, values[index], width * 0.92, label=name, color=model.look.colour)
        spread = [error or math.nan for error in errors[index]]
        axes.errorbar(at, values[index], yerr=spread, fmt="none", ecolor=INK, elinewidth=1)
        for place, value, error in zip(at, values[index], errors[index], strict=True):
            if math.isfinite(value):
                axes.annotate(f"{value:.{digits}f}", (place, value + error), (0, 2), textcoords="offset points",
                              ha="center", va="bottom", fontsize=8,
                              bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.3})  # fmt: skip
    reached = [value + error for row, extra in zip(values, errors, strict=True)
               for value, error in zip(row, extra, strict=True) if math.isfinite(value)]  # fmt: skip
    ends = max([*reached, *_mark_chance(axes, group, items)])
    if is_log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.set_ylim(top=ends * 2)
    else:
        axes.set_ylim(0, ends * 1.12)
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= min(top, ends * 1.12)])
    axes.set(ylabel=f"{unit}, log scale" if is_log else unit)
    longest = max(len(line) for label in labels for line in label.splitlines())
    is_crowded = 0.09 * longest > figure.get_figwidth() / (len(labels) + 1)
    axes.set_xticks(range(len(labels)), labels, rotation=25 if is_crowded else 0, fontsize=10,
                    ha="right" if is_crowded else "center")  # fmt: skip
    axes.margins(x=0.02)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID)
    _bars_legend(figure, axes, title)
    return figure


def _bars_legend(figure: Figure, axes: Any, title: str) -> None:
    """The title, and below it the models, then what guessing gives."""
    handles = [*axes.containers, *axes.collections]
    handles = [handle for handle in handles if not str(handle.get_label()).startswith("_")]
    across = max(1, int((figure.get_figwidth() - 0.8) // (0.6 + 0.095 * max(len(h.get_label()) for h in handles))))
    rows = math.ceil(len(handles) / across)
    axes.set_title(title, pad=12 + 18 * rows)
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=across, borderaxespad=0.2,
                handlelength=1.2, columnspacing=1.4, labelspacing=0.3)  # fmt: skip


def _names(group: Group) -> list[str]:
    """The models as a legend has them: by role where that tells them apart."""
    names = [model.role or model.label for model in group.models]
    return names if len(set(names)) == len(names) else [short(model.label) for model in group.models]


def _chance(item: Measure, models: Iterable[ScoredModel]) -> float | None:
    """What guessing gives, of the first of the models of which it is known."""
    return next((level for model in models if (level := item.chance(model)) is not None), None)


def _mark_chance(axes: Any, group: Group, items: Sequence[Measure]) -> list[float]:
    """A dashed line across the bars of every item of which it is known what guessing gives; those levels."""
    found = [(place, level) for place, item in enumerate(items) if (level := _chance(item, group.models)) is not None]
    levels = [level for _, level in found]
    if found:
        axes.hlines(levels, [place - 0.46 for place, _ in found], [place + 0.46 for place, _ in found],
                    label=_CHANCE_LABEL, **_CHANCE)  # fmt: skip
    return levels


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def accuracy_panels(groups: Sequence[Group]) -> Figure | None:
    """Accuracy of every model, the average first, with standard errors, the paper's figures and what guessing gives."""
    found = measures((model for group in groups for model in group.models), every_metric=True)
    shown = [item for item in found if item.kind == "average"]
    shown += [item for item in found if item.kind == "task" and item.is_percent]
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
    longest = max(len(short(model.name)) for _, model in rows)
    width = min(16.0, 0.6 + 0.085 * longest + max(2.9 * across, 5.0))
    figure = canvas(width, 0.4 + down * (0.85 + 0.27 * (rows[-1][0] + 1)))
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.14, h_pad=0.08)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, item in zip(grid.flat, shown, strict=False):
        _panel(axes, item, rows)
        name = titles[item]
        axes.set_title(f"{name}, log scale" if axes.get_xscale() == "log" else name, fontsize=11, pad=6)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    grid[0][0].set_yticks([place for place, _ in rows], [short(model.name) for _, model in rows])
    grid[0][0].set_ylim(rows[-1][0] + 0.7, -0.7)
    if len(shown) == 1:
        grid[0][0].set_xlabel(unit, fontsize=10)
    else:
        figure.supxlabel(unit, fontsize=10)
    _panels_legend(figure, [model for _, model in rows], grid.flat)
    return figure


def _panels_legend(figure: Figure, models: Sequence[ScoredModel], panels: Iterable[Any]) -> None:
    """What hues and marks stand for, above the panels; hues that are one model each are named beside their bars."""
    from matplotlib.patches import Patch

    hues = {model.look.family: model.look.hue for model in models if model.role}
    handles: list[Any] = [Patch(color=hue, label=short(family)) for family, hue in hues.items()]
    marks = {handle.get_label(): handle for axes in panels for handle in axes.collections
             if handle.get_label() in (_PAPER, _CHANCE_LABEL)}  # fmt: skip
    handles += marks.values()
    if handles:
        figure.legend(handles=handles, loc="outside upper left", fontsize=10, handlelength=1.2, columnspacing=1.4,
                      ncols=max(1, int(figure.get_figwidth() // 1.4)))  # fmt: skip


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
    axes.barh([place for place, _, _ in found], values, 0.78, color=[model.look.colour for _, model, _ in found])
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
                     zorder=3, label=_PAPER)  # fmt: skip
    level = _chance(item, (model for _, model, _ in found))
    if level is not None:
        ends.append(level)
        axes.vlines(level, found[0][0] - 0.6, found[-1][0] + 0.6, label=_CHANCE_LABEL, **_CHANCE)
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
