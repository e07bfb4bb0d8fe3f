"""A run's figures: each a function from its results to a matplotlib figure, or None when there is nothing to draw."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lors_cli.report.drawing import GRID, INK, PALETTE, figure_of, plain_ticks, sparsity_map
from lors_cli.report.names import task_name
from lors_cli.report.results import RunResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss(results: RunResults) -> Figure | None:
    """Training loss by optimiser step, with a running mean when there are many steps."""
    rows = results.log
    if not rows:
        return None
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, axes = figure_of(8, 4)
    window = len(losses) // 20
    if window >= 3:
        axes.plot(steps, losses, color="#9CC3DD", linewidth=1, label="each step")
        axes.plot(steps, running_mean(losses, window), color=PALETTE["tuned"], linewidth=2.2,
                  label=f"mean of {window} steps")  # fmt: skip
        axes.legend()
    else:
        few = len(steps) <= 40
        axes.plot(steps, losses, color=PALETTE["tuned"], linewidth=2, marker="o" if few else None, markersize=4)
    axes.set(title="Training loss", xlabel="optimiser step", ylabel="cross-entropy (nats per token)")
    axes.grid(axis="y", color=GRID)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def sparsity(results: RunResults) -> Figure | None:
    """Share of zeros of each pruned linear: decoder blocks across, kinds of linear down, colours fixed from 0 to 1."""
    record = results.records.get("prune") or results.records.get("tune")
    layers = record.metrics.get("layers") if record else None
    if not layers:
        return None
    rows: dict[str, dict[int, float]] = {}
    for layer in layers:
        block, kind = split_name(layer["name"])
        rows.setdefault(kind, {})[block] = layer["sparsity"]
    return sparsity_map(rows)


def accuracy(results: RunResults) -> Figure | None:
    """Zero-shot accuracy of each model and task, with standard errors where they are known."""
    tasks = _names(results, "tasks", "acc")
    if not tasks:
        return None
    names = [task_name(task) for task in tasks]
    labels = [*names, "average"] if len(tasks) > 1 and _has_average(results) else names
    values, errors = {}, {}
    for role, content in results.scores.items():
        scores = [content.get("tasks", {}).get(task, {}) for task in tasks]
        values[role] = [_percent(score.get("acc")) for score in scores]
        errors[role] = [_percent(score.get("acc_stderr")) for score in scores]
        if len(labels) > len(tasks):
            values[role].append(_percent((content.get("average") or {}).get("value")))
            errors[role].append(math.nan)
    return _bars(labels, values, errors, "Zero-shot accuracy", "accuracy (%)", top=100)


def perplexity(results: RunResults) -> Figure | None:
    """Perplexity of each model and text."""
    texts = _names(results, "perplexity", "value")
    if not texts:
        return None
    values = {
        role: [_number(content.get("perplexity", {}).get(text, {}).get("value")) for text in texts]
        for role, content in results.scores.items()
    }
    return _bars(texts, values, None, "Perplexity (lower is better)", "perplexity per token", top=None)


FIGURES: dict[str, Callable[[RunResults], Figure | None]] = {
    "accuracy": accuracy, "perplexity": perplexity, "loss": loss, "sparsity": sparsity,
}  # fmt: skip


def split_name(name: str) -> tuple[int, str]:
    """A linear's decoder block and its kind: `model.layers.3.self_attn.q_proj` is (3, "q_proj").

    Args:
        name: the module's dotted name; without a number the block is 0 and the kind the whole name.
    """
    found = re.fullmatch(r".*?\.?(\d+)\.(.+)", name)
    if not found:
        return 0, name
    return int(found.group(1)), re.sub(r"^(self_attn|attn|attention|mlp)\.", "", found.group(2))


def _bars(
    labels: list[str], values: dict[str, list[float]], errors: dict[str, list[float]] | None,
    title: str, unit: str, *, top: float | None,
) -> Figure:  # fmt: skip
    """Groups of bars, one colour a model, each with its value on top."""
    figure, axes = figure_of(max(5.0, min(15.0, 1.8 + 0.42 * len(labels) * (len(values) + 0.8))), 4.2)
    width = 0.8 / len(values)
    finite = [value for row in values.values() for value in row if math.isfinite(value)]
    digits = 1 if max(finite) < 1000 else 0
    is_log = top is None and max(finite) > 20 * min(finite) > 0
    for index, (role, row) in enumerate(values.items()):
        at = [group + (index - (len(values) - 1) / 2) * width for group in range(len(labels))]
        bars = axes.bar(at, row, width * 0.92, label=role, color=PALETTE[role])
        spread = errors[role] if errors else [math.nan] * len(row)
        if any(map(math.isfinite, spread)):
            axes.errorbar(at, row, yerr=spread, fmt="none", ecolor=INK, elinewidth=1)
        lifted = [value + (error if math.isfinite(error) else 0) for value, error in zip(row, spread, strict=True)]
        for bar, height, value in zip(bars, lifted, row, strict=True):
            if math.isfinite(value):
                middle = bar.get_x() + bar.get_width() / 2
                axes.annotate(f"{value:.{digits}f}", (middle, height), (0, 2), textcoords="offset points",
                              ha="center", va="bottom", fontsize=8)  # fmt: skip
    if is_log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.set_ylim(top=max(finite) * 2)
    else:
        axes.set_ylim(0, min(top or math.inf, max(finite) * 1.15))
    axes.set(ylabel=f"{unit}, log scale" if is_log else unit)
    is_crowded = 0.1 * max(map(len, labels)) > figure.get_figwidth() / len(labels)
    axes.set_xticks(range(len(labels)), labels, rotation=20 if is_crowded else 0,
                    ha="right" if is_crowded else "center")  # fmt: skip
    axes.set_title(title, pad=30)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(values), borderaxespad=0.2,
                handlelength=1.2, columnspacing=1.4)  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID)
    return figure


def _names(results: RunResults, group: str, value: str) -> list[str]:
    """Tasks or texts for which any model has a number, in order of appearance."""
    found: dict[str, None] = {}
    for content in results.scores.values():
        for name, score in (content.get(group) or {}).items():
            if math.isfinite(_number(score.get(value))):
                found[name] = None
    return list(found)


def _has_average(results: RunResults) -> bool:
    return any((content.get("average") or {}).get("value") is not None for content in results.scores.values())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _percent(value: Any) -> float:
    return 100 * _number(value)


def running_mean(values: list[float], window: int) -> list[float]:
    """Means over up to `window` values that end at each position."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means
