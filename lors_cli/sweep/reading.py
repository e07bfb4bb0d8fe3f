"""A sweep's file: base recipes, settings for all cells, the grid, and what goes with a value of it.

Read as recipes are: all problems at once, each at its file and line. Keys are dotted (`tune.rank`); below `set` and
`per` sections may be nested too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lors_cli.errors import UsageError, nearest, shorten
from lors_cli.recipe.checking import SHAPES
from lors_cli.recipe.loading import apply_overrides, read_settings, unknown_setting
from lors_cli.recipe.schema import NAME, Recipe
from lors_cli.recipe.settings import KeyPath, Place, Settings, dotted
from lors_cli.recipe.shipped import find
from lors_cli.sweep.axes import read_grids, read_per
from lors_cli.sweep.draft import Draft, Setting, part, settings_below, unique

KEYS = ("name", "recipe", "set", "grid", "per")


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Read a sweep's YAML file; `overrides` (`eval.limit=50`) hold for all cells and win over the file.

    Raises:
        UsageError: the file cannot be read, or with everything that is wrong with it as a sweep.
    """
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
    read_grids(sheet, draft)
    read_per(sheet, draft)
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
    axes = draft.axes()
    for setting in settings:
        if setting.name in axes:
            sheet.add((), "is an axis of the grid; --only chooses cells", setting.place)
    keys = [setting.keys for setting in settings]
    draft.common = [*_without(draft.common, keys), *settings]
    draft.per = {key: _without(known, keys) for key, known in draft.per.items()}


def _without(settings: list[Setting], keys: list[tuple[str, ...]]) -> list[Setting]:
    """Those that none of `keys` replaces."""

    def overlaps(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        shorter = min(len(one), len(other))
        return one[:shorter] == other[:shorter]

    return [setting for setting in settings if not any(overlaps(setting.keys, key) for key in keys)]
