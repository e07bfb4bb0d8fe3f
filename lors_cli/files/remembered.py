"""What is remembered per user from run to run: files in $XDG_CACHE_HOME/lors that may be deleted at any time."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.files.atomic import read_json, write_json
from lors_cli.output import console


def user_cache() -> Path:
    """The folder, $XDG_CACHE_HOME/lors (~/.cache/lors)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lors"


@dataclass(frozen=True)
class Remembered:
    """Values by key in one JSON file of the user's cache, and those of this process in its memory too: where the file
    cannot be read or written, nothing else is known.

    Args:
        name: the file's, without `.json`.
        what: is remembered, as the log names it where that cannot be written.
        most: entries, beside the last one kept.
    """

    name: str
    what: str
    most: int = 100
    _here: dict[tuple[Path, str], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def get(self, key: str) -> Any:
        """What was kept, None where it was not."""
        here = self._here.get((self._file, key))
        return self._all().get(key) if here is None else here

    def keep(self, key: str, value: Any) -> None:
        """Put a JSON value in, in place of the oldest entries where there are too many."""
        self._here[self._file, key] = value
        try:
            write_json(self._file, {**dict(list(self._all().items())[-self.most :]), key: value})
        except OSError as error:
            console.detail(f"{self.what} are not remembered: {error}")

    @property
    def _file(self) -> Path:
        return user_cache() / f"{self.name}.json"

    def _all(self) -> dict[str, Any]:
        try:
            found = read_json(self._file)
        except OSError:
            return {}
        return found if isinstance(found, dict) else {}
