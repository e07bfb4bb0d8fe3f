"""The cells of a sweep: every combination of its axes' values, each a checked recipe."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError, did_you_mean
from lors_cli.files import hashes
from lors_cli.recipe.loading import resolve_recipe
from lors_cli.recipe.schema import Recipe
from lors_cli.recipe.settings import MAX_SHOWN
from lors_cli.recipe.yaml12 import write
from lors_cli.sweep.draft import RECIPE_AXIS, Draft, Setting, value_key
from lors_cli.sweep.reading import read_sweep

SHOWN_CELLS = 3
"""Cells that a message names at most."""


@dataclass(frozen=True)
class Cell:
    """One recipe of a sweep: `values` is what it has on each axis, `overrides` all that it changes in its base."""

    name: str
    base: str
    values: dict[str, Any]
    overrides: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A sweep whose cells have all been checked; `text` is the same sweep as YAML, with the base recipes in it."""

    name: str
    axes: dict[str, list[Any]]
    cells: tuple[Cell, ...]
    text: str


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's YAML file and check the recipe of every cell; `overrides` (`eval.limit=50`) hold for all cells.

    Raises:
        UsageError: with everything that is wrong; what is wrong with a cell's recipe names the cell.
    """
    draft = read_sweep(path, overrides)
    cells, problems = [], dict[str, list[str]]()
    for name, base, values, settings in _combinations(draft):
        try:
            recipe = _recipe(draft, base, settings)
        except UsageError as error:
            for line in error.message.splitlines():
                problems.setdefault(line, []).append(name)
            continue
        given = {setting.name: setting.value for setting in settings}
        cells.append(Cell(name, base, values, given, recipe))
    if problems:
        lines = [f"{line} ({in_cells(names)})" for line, names in problems.items()]
        more = [f"and {len(lines) - MAX_SHOWN} more problems"] if len(lines) > MAX_SHOWN else []
        raise UsageError("\n".join(lines[:MAX_SHOWN] + more))
    return Sweep(draft.name, draft.axes(), tuple(cells), _text(draft))


def in_cells(names: Sequence[str]) -> str:
    """`cell a`, `cells a, b`, `cells a, b, c and 9 more`."""
    shown = ", ".join(names[:SHOWN_CELLS])
    more = f" and {len(names) - SHOWN_CELLS} more" if len(names) > SHOWN_CELLS else ""
    return f"cell{'s' if len(names) > 1 else ''} {shown}{more}"


def select_cells(sweep: Sweep, only: Sequence[str]) -> tuple[Cell, ...]:
    """The cells that `only` asks for by name or pattern (`sparsegpt-*`), in the sweep's order; all when it is empty."""
    names = [cell.name for cell in sweep.cells]
    chosen: set[str] = set()
    for pattern in only:
        found = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
        if not found:
            hint = " ".join(filter(None, (did_you_mean(pattern, names), f"Cells: {', '.join(names)}.")))
            raise UsageError(f"--only {pattern}: {sweep.name} has no such cell.", hint)
        chosen.update(found)
    return tuple(cell for cell in sweep.cells if cell.name in chosen) if only else sweep.cells


# Making them ----------------------------------------------------------------------------------------------------


def _combinations(draft: Draft) -> Iterator[tuple[str, str, dict[str, Any], list[Setting]]]:
    """Every cell's name, base recipe, values, and settings from the weakest to the strongest."""
    found: list[tuple[str, dict[str, Any], list[Setting]]] = []
    for grid in draft.grids:
        for base in draft.bases:
            for chosen in itertools.product(*grid.values()):
                values: dict[str, Any] = {RECIPE_AXIS: base} if draft.varies else {}
                values.update(zip(grid, (setting.value for setting in chosen), strict=True))
                found.append((base, values, [*draft.common, *chosen, *_accompanying(draft, base, values)]))
    short = ["-".join(_word(axis, value) for axis, value in values.items()) or base for base, values, _ in found]
    counts = Counter(short)
    seen: dict[str, None] = {}
    for name, (base, values, settings) in zip(short, found, strict=True):
        if counts[name] > 1:
            name = "-".join(f"{axis}={_whole(value)}" for axis, value in values.items())
        if name in seen:
            raise UsageError(f"grid: two cells are the same: {name}")
        seen[name] = None
        yield name, base, values, settings


def _word(axis: str, value: Any) -> str:
    """A value as a part of a cell's name, which never starts like an option; a number stands behind its key."""
    if not isinstance(value, str):
        shown = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else json.dumps(value)
        return f"{axis.rpartition('.')[2]}{shown}"
    return re.sub(r"[^\w.-]+", "_", value.replace(":", "of"))[-60:].strip("_-") or "empty"


def _whole(value: Any) -> str:
    """The same where it must tell values apart: a text that is not its own word has some digits of its hash."""
    word = _word("", value)
    is_itself = word == value or not isinstance(value, str)
    return word if is_itself else f"{word}-{hashes.digits(value, 6)}"


def _accompanying(draft: Draft, base: str, values: dict[str, Any]) -> list[Setting]:
    """What goes with these values."""
    by_key: dict[tuple[str, ...], Setting] = {}
    for axis, value in {RECIPE_AXIS: base, **values}.items():
        for setting in draft.per.get((axis, value_key(value)), []):
            known = by_key.setdefault(setting.keys, setting)
            if known is not setting:
                raise UsageError(
                    f"{setting.place.label}: {setting.name} is given on {known.place.label} too, and both hold for "
                    f"{', '.join(str(value) for value in values.values())}"
                )
    return list(by_key.values())


def _recipe(draft: Draft, base: str, settings: list[Setting]) -> Recipe:
    mine = copy.deepcopy(draft.bases[base])
    for setting in settings:
        mine.set(setting.keys, copy.deepcopy(setting.value), setting.place, setting.raws)
    return resolve_recipe(mine)


def _text(draft: Draft) -> str:
    """The sweep as YAML with its base recipes in it."""
    bases = [{"name": name, **settings.data} for name, settings in draft.bases.items()]
    content: dict[str, Any] = {"name": draft.name, "recipe": bases if draft.varies else bases[0]}
    if draft.common:
        content["set"] = {setting.name: setting.value for setting in draft.common}
    grids = [{axis: [setting.value for setting in chosen] for axis, chosen in grid.items()} for grid in draft.grids]
    if any(grids):
        content["grid"] = grids if len(grids) > 1 else grids[0]
    per: dict[str, dict[str, Any]] = {}
    for (axis, key), settings in draft.per.items():
        if settings:
            text = key[1] if isinstance(key[1], str) else json.dumps(key[1])
            per.setdefault(axis, {})[text] = {setting.name: setting.value for setting in settings}
    if per:
        content["per"] = per
    return write(content)
