"""A sweep's file: base recipes, settings for all cells, the grid, and what goes with a value of it.

Read as recipes are: all problems at once, each at its file and line. Keys are dotted (`tune.rank`); below `set` and
`per` sections may be nested too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError, nearest, shorten
from lors_cli.recipe.checking import SHAPES, field_names, owner, subsection
from lors_cli.recipe.loading import STAGE_SEEDS, apply_overrides, read_settings, unknown_setting
from lors_cli.recipe.schema import NAME, Recipe
from lors_cli.recipe.settings import KeyPath, Place, Settings, dotted
from lors_cli.recipe.shipped import find
from lors_cli.recipe.yaml12 import resolve
from lors_cli.sweep.draft import RECIPE_AXIS, Draft, Setting, later, part, settings_below, unique, value_key

MAX_CELLS = 1000
KEYS = ("name", "recipe", "set", "grid", "per")


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Read a sweep's YAML file; `overrides` (`eval.limit=50`) hold for all cells and win over the file."""
    sheet = read_settings(path)
    if "recipe" not in sheet.data and "model" in sheet.data:
        raise UsageError(f"{path} is a recipe, not a sweep.", f"For it there is: lors run {path}")
    draft = Draft()
    for key in sheet.data:
        if key not in KEYS:
            close = nearest(key.lower(), KEYS)
            known = f"did you mean {close}?" if close else f"known here: {', '.join(KEYS)}"
            hint = "; a recipe's own settings go below set" if unknown_setting(Recipe, (key,)) is None else f"; {known}"
            sheet.add((key,), f"unknown key{hint}")
    draft.name = _name(sheet)
    _read_bases(sheet, path.parent, draft)
    draft.common = unique(sheet, list(settings_below(sheet, ("set",)))) if "set" in sheet.data else []
    _read_grids(sheet, draft)
    _read_per(sheet, draft)
    for setting in draft.common:
        if setting.name in draft.axes():
            sheet.add(("set",), f"{setting.name} is an axis of the grid too", setting.place)
    _apply(sheet, draft, overrides)
    sheet.fail()
    return draft


def _name(sheet: Settings) -> str:
    name = sheet.data.get("name")
    if "name" not in sheet.data:
        sheet.add(("name",), "this key is missing")
    elif not isinstance(name, str) or not re.fullmatch(NAME, name):
        sheet.add(("name",), SHAPES["name"])
    return str(name)


# Base recipes ---------------------------------------------------------------------------------------------------


def _read_bases(sheet: Settings, folder: Path, draft: Draft) -> None:
    given = sheet.data.get("recipe")
    if "recipe" not in sheet.data:
        sheet.add(("recipe",), "this key is missing: a recipe's name or file, or a list of them")
        return
    draft.varies = isinstance(given, list)
    entries = list(enumerate(given)) if isinstance(given, list) else [(None, given)]
    if not entries:
        sheet.add(("recipe",), "must have at least one entry")
    for index, entry in entries:
        at: KeyPath = ("recipe",) if index is None else ("recipe", index)
        if isinstance(entry, dict):
            settings = part(sheet, at)
        elif isinstance(entry, str) and entry:
            beside = folder / entry
            try:
                settings = read_settings(beside if beside.is_file() else find("recipe", entry))
            except UsageError as error:
                sheet.add(at, " ".join(filter(None, (error.message, error.hint))))
                continue
        else:
            sheet.add(at, "must be a recipe's name or file, or its settings")
            continue
        name = settings.data.get("name")
        name = name if isinstance(name, str) else dotted(at) if isinstance(entry, dict) else Path(entry).stem
        if name in draft.bases:
            sheet.add(at, f"two recipes are named {shorten(name)}")
        draft.bases[name] = settings


# The grid -------------------------------------------------------------------------------------------------------


def _read_grids(sheet: Settings, draft: Draft) -> None:
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


def _read_per(sheet: Settings, draft: Draft) -> None:
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


# The command line -----------------------------------------------------------------------------------------------


def _apply(sheet: Settings, draft: Draft, overrides: Sequence[str]) -> None:
    """Put the command line's settings in place of the file's."""
    given = Settings({}, {(): Place("override", (1, 0))})
    apply_overrides(Recipe, given, overrides)
    sheet.problems += given.problems
    if given.problems or not given.data:
        return
    settings = list(settings_below(given, ()))
    sheet.problems += given.problems
    keys = [setting.keys for setting in settings]
    seeds = STAGE_SEEDS if ("seed",) in keys else ()  # which the recipe's then is
    axes = draft.axes()
    for setting in settings:
        for name in (setting.name, *(map(".".join, seeds) if setting.keys == ("seed",) else ())):
            if name in axes:
                sheet.add((), f"{name} is an axis of the grid; --only chooses cells", setting.place)
    draft.common = [*_without(draft.common, keys, seeds), *settings]
    draft.per = {key: _without(known, keys, seeds) for key, known in draft.per.items()}


def _without(settings: list[Setting], keys: list[tuple[str, ...]], seeds: tuple[tuple[str, ...], ...]) -> list[Setting]:
    """Those that are none of `seeds` and that none of `keys` replaces."""

    def overlaps(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        shorter = min(len(one), len(other))
        return one[:shorter] == other[:shorter]

    return [setting for setting in settings
            if setting.keys not in seeds and not any(overlaps(setting.keys, key) for key in keys)]  # fmt: skip
