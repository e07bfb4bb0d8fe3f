"""The figures of `lors bench`: speed and memory by sequence length and by rank, and step times beside the authors'."""

from __future__ import annotations

import math
from typing import Any

from lors_cli.bench.measure import AUTHORS_LOG, Cell
from lors_cli.report.drawing import GRID, METHOD_COLOURS, byte_unit, figure_of, png, style

Document = dict[str, Any]


def draw(document: Document) -> dict[str, bytes]:
    """Every figure as PNG bytes by name, of what `bench` returns once all cells are measured."""
    settings = document["settings"]
    lengths, ranks = settings["lengths"], settings["ranks"]
    figures = {}
    for checkpointing in settings["checkpointing"]:
        ending = "_checkpointing" if checkpointing else ""
        by_length = {f"{length:,} tokens": _cell(document, length, ranks[0], checkpointing) for length in lengths}
        by_rank = {f"rank {rank}": _cell(document, lengths[-1], rank, checkpointing) for rank in ranks}
        at_rank, at_length = f"rank {ranks[0]}", f"{lengths[-1]:,} tokens"
        figures[f"speed_by_length{ending}"] = _bars(by_length, _speed, f"Training speed, {at_rank}", "tokens/s")
        figures[f"speed_by_rank{ending}"] = _bars(by_rank, _speed, f"Training speed, {at_length}", "tokens/s")
        figures[f"memory_by_length{ending}"] = _memory(by_length, f"Peak memory, {at_rank}")
        figures[f"memory_by_rank{ending}"] = _memory(by_rank, f"Peak memory, {at_length}")
    beside = _beside_the_authors(_cell(document, lengths[-1], ranks[0], settings["checkpointing"][0]))
    return figures | ({"beside_the_authors": beside} if beside else {})


def _cell(document: Document, length: int, rank: int, checkpointing: bool) -> dict[str, Any]:
    return document["cells"][str(Cell(length, rank, checkpointing))]


def _speed(figures: dict[str, Any]) -> float:
    return float(figures["tokens_per_s"]["median"])


def _memory(groups: dict[str, dict[str, Any]], title: str) -> bytes:
    """Bars of peak memory, in the unit that suits the largest."""
    peaks = [float(figures.get("peak_bytes", 0)) for cell in groups.values() for figures in cell.values()]
    name, size = byte_unit(max(peaks))
    return _bars(groups, lambda figures: float(figures["peak_bytes"]) / size, title, name)


def _bars(groups: dict[str, dict[str, Any]], value: Any, title: str, unit: str) -> bytes:
    """Groups of bars, a colour a method, each bar named once in the legend."""
    methods = list(dict.fromkeys(method for cell in groups.values() for method in cell))  # some fit some ranks alone
    with style():
        figure, axes = figure_of(max(6.0, 1.6 + 0.3 * len(groups) * (len(methods) + 1.5)), 4.2)
        width = 0.84 / len(methods)
        for index, method in enumerate(methods):
            found = [cell.get(method) for cell in groups.values()]
            heights = [math.nan if each is None or "failed" in each else value(each) for each in found]
            at = [group + (index - (len(methods) - 1) / 2) * width for group in range(len(groups))]
            axes.bar(at, heights, width * 0.92, label=method, color=METHOD_COLOURS[method])
            for place, each in zip(at, found, strict=True):
                if each is not None and "failed" in each:
                    axes.annotate("out of memory", (place, 0), (0, 3), textcoords="offset points", rotation=90,
                                  ha="center", va="bottom", fontsize=8)  # fmt: skip
        axes.set_title(title, pad=46 if len(methods) > 5 else 30)
        axes.set(ylabel=unit)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.tick_params(axis="x", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(5, len(methods)), borderaxespad=0.2,
                    handlelength=1.0, columnspacing=1.2, fontsize=9)  # fmt: skip
        axes.grid(axis="y", color=GRID)
        return png(figure)


def _beside_the_authors(cell: dict[str, Any]) -> bytes | None:
    """Step time over LoRA's, measured here and in the LoRS authors' log."""
    shown = [name for name in AUTHORS_LOG if "step_over_lora" in cell.get(name, {})]
    if len(shown) < 2:
        return None
    with style():
        figure, axes = figure_of(6.4, 4.0)
        here = [cell[name]["step_over_lora"]["median"] for name in shown]
        theirs = [AUTHORS_LOG[name][0] / AUTHORS_LOG["lora"][0] for name in shown]
        for shift, heights, colour, label in ((-0.2, here, "#0072B2", "measured here"),
                                              (0.2, theirs, "#BBBBBB", "authors' log, A6000")):  # fmt: skip
            at = [place + shift for place in range(len(shown))]
            axes.bar(at, heights, 0.37, color=colour, label=label)
            for place, height in zip(at, heights, strict=True):
                axes.annotate(f"{height:.2f}", (place, height), (0, 2), textcoords="offset points", ha="center",
                              fontsize=9)  # fmt: skip
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_title("Step time relative to LoRA (lower is faster)", pad=30)
        axes.set_xticks(range(len(shown)), shown)
        axes.tick_params(axis="x", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, borderaxespad=0.2)
        axes.grid(axis="y", color=GRID)
        return png(figure)
