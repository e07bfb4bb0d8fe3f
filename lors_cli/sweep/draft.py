"""What a sweep's file says, before it becomes cells: settings with their places, base recipes, grids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lors_cli.recipe.loading import unknown_setting
from lors_cli.recipe.schema import Recipe
from lors_cli.recipe.settings import KeyPath, Place, Settings

RECIPE_AXIS = "recipe"


@dataclass(frozen=True)
class Setting:
    """One value that a sweep gives to a recipe's key, and where it stands."""

    keys: tuple[str, ...]
    value: Any
    place: Place
    raws: dict[KeyPath, str]

    @property
    def name(self) -> str:
        """The dotted key."""
        return ".".join(self.keys)


@dataclass
class Draft:
    """A sweep as written.

    `varies`: several base recipes make `recipe` an axis; `per`: by axis and value (`value_key`), what goes with it.
    """

    name: str = ""
    bases: dict[str, Settings] = field(default_factory=dict)
    varies: bool = False
    common: list[Setting] = field(default_factory=list)
    grids: list[dict[str, list[Setting]]] = field(default_factory=list)
    per: dict[tuple[str, Any], list[Setting]] = field(default_factory=dict)

    def axes(self) -> dict[str, list[Any]]:
        """What varies, with all its values in the order of the file."""
        found: dict[str, list[Any]] = {RECIPE_AXIS: list(self.bases)} if self.varies else {}
        for grid in self.grids:
            for name, settings in grid.items():
                known = found.setdefault(name, [])
                keys = {value_key(value) for value in known}
                known += [setting.value for setting in settings if value_key(setting.value) not in keys]
        return found


def value_key(value: Any) -> tuple[str, Any]:
    """What tells an axis's values apart: 1 and 1.0 are one value, 1 and true are two."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", float(value)
    return type(value).__name__, value


def part(sheet: Settings, at: KeyPath) -> Settings:
    """What stands below `at`, as settings of its own."""
    data: Any = sheet.data
    for key in at:
        data = data[key]
    size = len(at)
    places = {path[size:]: place for path, place in sheet.places.items() if path[:size] == at}
    raws = {path[size:]: raw for path, raw in sheet.raws.items() if path[:size] == at}
    return Settings(data, places, raws)


def settings_below(sheet: Settings, at: KeyPath) -> Iterator[Setting]:
    """The recipe settings below `at`, those in nested sections too; what is wrong with them is noted."""
    section = part(sheet, at)
    if not isinstance(section.data, dict) or not section.data:
        sheet.add(at, "must hold a recipe's settings, such as `eval.limit: 50`")
        return

    def walk(value: Any, inner: KeyPath, keys: tuple[str, ...]) -> Iterator[Setting]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, (*inner, key), (*keys, *key.split(".")))
            return
        raws = {path[len(inner) :]: raw for path, raw in section.raws.items() if path[: len(inner)] == inner}
        setting = Setting(keys, value, later(section.place(inner)), raws)
        problem = _unusable(setting)
        if problem:
            sheet.add((*at, *keys), problem, section.place(inner))
        else:
            yield setting

    yield from walk(section.data, (), ())


def later(place: Place) -> Place:
    """The same place, but later than all in a base recipe's file."""
    return Place(place.label, (1 + place.order[0], place.order[1]), place.names)


def _unusable(setting: Setting) -> str | None:
    """What is wrong with a setting whatever the recipe."""
    unknown = unknown_setting(Recipe, setting.keys)
    if unknown:
        return unknown
    if setting.keys == ("name",):
        return "a cell's name is made from its values"
    if setting.value == {} or setting.raws.get(()) == "":
        return "is empty; give a value, or remove the key"
    return None


def unique(sheet: Settings, settings: list[Setting]) -> list[Setting]:
    """The same settings; those given twice are noted."""
    seen: set[tuple[str, ...]] = set()
    for setting in settings:
        if setting.keys in seen:
            sheet.add(("set",), f"{setting.name} is given twice", setting.place)
        seen.add(setting.keys)
    return settings
