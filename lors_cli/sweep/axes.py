"""The grid of a sweep, and what goes with each of its values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lors_cli.errors import nearest, shorten
from lors_cli.recipe.checking import field_names, owner, subsection
from lors_cli.recipe.loading import unknown_setting
from lors_cli.recipe.schema import Recipe
from lors_cli.recipe.settings import KeyPath, Settings
from lors_cli.recipe.yaml12 import resolve
from lors_cli.sweep.draft import RECIPE_AXIS, Draft, Setting, later, settings_below, unique, value_key

MAX_CELLS = 1000


def read_grids(sheet: Settings, draft: Draft) -> None:
    """Read `grid`, one mapping of axes to values or a list of them, into a draft that has its base recipes."""
    given = sheet.data.get("grid")
    if "grid" not in sheet.data:
        if not draft.varies:
            sheet.add(("grid",), "this key is missing: axes with their values, for example {tune.rank: [8, 16]}")
        draft.grids = [{}]
        return
    entries: list[tuple[KeyPath, Any]] = [(("grid",), given)]
    if isinstance(given, list) and given:
        entries = [(("grid", index), entry) for index, entry in enumerate(given)]
    for at, entry in entries:
        if not isinstance(entry, dict) or not entry:
            sheet.add(at, "must hold axes with their values, for example {tune.rank: [8, 16]}")
            continue
        axes = {axis: _axis(sheet, (*at, axis), axis, values) for axis, values in entry.items()}
        draft.grids.append(axes)
    num_cells = len(draft.bases) * sum(math.prod(len(values) for values in grid.values()) for grid in draft.grids)
    if num_cells > MAX_CELLS:
        sheet.add(("grid",), f"makes {num_cells} cells; at most {MAX_CELLS} are run in one sweep")


def _axis(sheet: Settings, at: KeyPath, axis: str, values: Any) -> list[Setting]:
    keys = tuple(axis.split("."))
    if axis == RECIPE_AXIS:
        sheet.add(at, "base recipes are listed at the top level: `recipe: [a, b]`")
        return []
    unknown = unknown_setting(Recipe, keys)
    if unknown or keys == ("name",):
        sheet.add(at, unknown or "a cell's name is made from its values")
        return []
    section = subsection(owner(Recipe, keys[:-1]), keys[-1])
    if section:
        sheet.add(at, f"is a section; an axis is a single setting, such as {axis}.{field_names(section)[0]}")
        return []
    if not isinstance(values, list) or not values:
        shown = sheet.raws.get(at) or ("value" if isinstance(values, (dict, list)) else str(values))
        sheet.add(at, f"must be a list of values, for example [{shorten(shown)}]")
        return []
    return list(_axis_values(sheet, at, keys, values))


def _axis_values(sheet: Settings, at: KeyPath, keys: tuple[str, ...], values: list[Any]) -> Iterator[Setting]:
    seen = set()
    for index, value in enumerate(values):
        raw = sheet.raws.get((*at, index))
        if isinstance(value, (list, dict)) or raw == "":
            sheet.add((*at, index), "each value must be one text, number, true or false")
        elif value_key(value) in seen:
            sheet.add((*at, index), f"{shorten(str(value))} is listed twice")
        else:
            seen.add(value_key(value))
            raws: dict[KeyPath, str] = {} if raw is None else {(): raw}
            yield Setting(keys, value, later(sheet.place((*at, index))), raws)


# What goes with a value -----------------------------------------------------------------------------------------


def read_per(sheet: Settings, draft: Draft) -> None:
    """Read `per` (axis, value, settings) into a draft that has its base recipes and grids."""
    given = sheet.data.get("per", {})
    axes = {RECIPE_AXIS: list(draft.bases), **draft.axes()}
    if not isinstance(given, dict) or (not given and "per" in sheet.data):
        sheet.add(("per",), "must hold axes, their values and the settings that go with each")
        return
    for axis, table in given.items():
        if axis not in axes:
            close = nearest(axis, axes)
            ending = f"did you mean {close}?" if close else f"there are: {', '.join(axes)}"
            sheet.add(("per", axis), f"is no axis of the grid; {ending}")
        elif not isinstance(table, dict) or not table:
            sheet.add(("per", axis), "must hold values of this axis and the settings that go with each")
        else:
            for text in table:
                _read_per_value(sheet, draft, axis, text, axes)


def _read_per_value(sheet: Settings, draft: Draft, axis: str, text: str, axes: dict[str, list[Any]]) -> None:
    at: KeyPath = ("per", axis, text)
    known = {value_key(value) for value in axes[axis]}
    key = next((key for key in (value_key(text), value_key(resolve(text))) if key in known), None)
    if key is None:
        names = [str(value) for value in axes[axis]]
        close = nearest(text, names)
        ending = f"did you mean {close}?" if close else f"it has {', '.join(names)}"
        sheet.add(at, f"{axis} has no such value in the grid; {ending}")
        return
    settings = list(settings_below(sheet, at))
    for setting in settings:
        if setting.name in axes:
            sheet.add(at, f"{setting.name} is an axis of the grid itself", setting.place)
    draft.per[axis, key] = unique(sheet, settings)
