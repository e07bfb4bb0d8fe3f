"""A recipe as read: values with the places they stand at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lors_cli.errors import UsageError, shorten

KeyPath = tuple[str | int, ...]
MAX_SHOWN = 40


@dataclass(frozen=True)
class Place:
    """Where a setting was given: a line of a file, an override or a flag."""

    label: str
    order: tuple[int, int]
    names: KeyPath | None = None
    """The key path that the label itself names, so that a message need not."""


@dataclass
class Settings:
    """Plain data, the place and the unquoted text of its key paths, and what is wrong with it so far."""

    data: dict[str, Any]
    places: dict[KeyPath, Place]
    raws: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Where the nearest thing to `path` was given."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def add(self, path: KeyPath, message: str, place: Place | None = None) -> None:
        """Note what is wrong at `path`; a problem noted before is kept once."""
        place = place or self.place(path)
        named = dotted(path)
        full = message if not named or place.names == path else f"{named}: {message}"
        if (place, full) not in self.problems[-MAX_SHOWN:]:
            self.problems.append((place, full))

    def set(self, path: KeyPath, value: Any, place: Place, raws: dict[KeyPath, str]) -> None:
        """Put `value` at `path`, making sections on the way; left alone where a scalar stands in between."""
        section = self.data
        for depth, key in enumerate(path[:-1], 1):
            if section.get(str(key)) is None:
                section[str(key)] = {}
                self.places[path[:depth]] = place
                self.raws.pop(path[:depth], None)
            section = section[str(key)]
            if not isinstance(section, dict):
                return
        section[str(path[-1])] = value
        for table in (self.places, self.raws):
            for stale in [known for known in table if known[: len(path)] == path]:
                table.pop(stale)
        self.places[path] = place
        self.raws.update({(*path, *inner): raw for inner, raw in raws.items()})

    def fail(self) -> None:
        """Raise a UsageError with all problems, if there are any."""
        if not self.problems:
            return
        ordered = sorted(self.problems, key=lambda problem: problem[0].order)
        lines = [f"{place.label}: {message}" for place, message in ordered[:MAX_SHOWN]]
        if len(ordered) > MAX_SHOWN:
            lines.append(f"and {len(ordered) - MAX_SHOWN} more problems")
        raise UsageError("\n".join(lines))


def flag_name(key: str) -> str:
    """The flag of a stage's setting, as a parameter: a_b is --a-b."""
    return "calibration" if key == "calibration.dataset" else key.rpartition(".")[2]


def dotted(path: Iterable[str | int]) -> str:
    """A key path as people write it; places in a list are left out."""
    return ".".join(shorten(key) for key in path if isinstance(key, str))
