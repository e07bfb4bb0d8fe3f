"""What every section of a recipe has: it checks itself however it is made, and its repr is short."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from typing import Any

from pydantic import ConfigDict

from lors_cli.errors import UsageError
from lors_cli.files.hashes import plain
from lors_cli.recipe.checking import IS_CHECKING, check, field_names, unknown_key
from lors_cli.recipe.rules import broken
from lors_cli.recipe.settings import Place, Settings

OWN_METHODS: set[str] = set()
"""Names that `method` may have too: of methods that are added from Python (docs/how-to.md)."""
_MODELS = ("path", "teacher", "include_path")
"""Settings that name a model or a folder, whose ~ is the user's home."""


class SettingError(UsageError, ValueError):
    """A section built from Python has a wrong setting."""


class Section:
    """A frozen dataclass of settings; read from YAML or built from Python, it refuses the same in the same words."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = Section.__repr__  # type: ignore[method-assign]  # a dataclass leaves it alone then

    def __new__(cls, *args: Any, **given: Any) -> Any:
        schema: Any = cls
        odd = [key for key in given if key not in field_names(schema)]
        unknown = [f"{cls.__name__}: {key}: {unknown_key(cls, key, ())}" for key in odd]
        if unknown:
            raise SettingError("\n".join(unknown))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _MODELS:
            if isinstance(path := getattr(self, name, None), (str, os.PathLike)):
                object.__setattr__(self, name, os.path.expanduser(os.fspath(path)))
        if not IS_CHECKING.get():
            self._check()
        for key, message in broken(self):
            raise ValueError(f"{key}: {message}" if key else message)

    def _check(self) -> None:
        """Hold what was given against the schema, as a recipe's, and take what that makes of it: 3.0 of 3, say."""
        given = {entry.name: plain(value) for entry in fields(self)  # type: ignore[arg-type]
                 if (value := getattr(self, entry.name)) is not None or entry.default is not None}  # fmt: skip
        for section in (given, *given.values()):
            if isinstance(section, dict) and section.get("method") in OWN_METHODS:
                del section["method"]
        try:
            checked = check(type(self), Settings(given, {(): Place(type(self).__name__, (0, 0))}))
        except UsageError as error:
            raise SettingError(error.message, error.hint) from None
        for name in given:
            if not isinstance(getattr(self, name), Section):  # which has been checked itself
                object.__setattr__(self, name, getattr(checked, name))

    def __repr__(self) -> str:
        """What differs from the defaults."""
        shown = []
        for entry in fields(self):  # type: ignore[arg-type]
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if (value := getattr(self, entry.name)) != default:
                shown.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"
