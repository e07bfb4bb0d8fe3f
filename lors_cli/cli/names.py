"""Models on a command line, each with a short name: NAME=MODEL, or the last part of its path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lors_cli.cli.stages import model_labels
from lors_cli.errors import UsageError

_NAMED = re.compile(r"([A-Za-z0-9][\w.-]{0,99})=(.+)", re.DOTALL)


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """Labels to models, in the order given; models without a name are numbered where two are alike.

    Raises:
        UsageError: a name is given twice.
    """
    labels: dict[str, str] = {}
    pairs = [_split(argument) for argument in arguments]
    names = [name for name, _ in pairs if name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two models are called {twice}.", "Give each its own name: NAME=MODEL.")
    for name, path in pairs:
        label = plain = name or next(iter(model_labels([path])))
        number = 2
        while name is None and (label in labels or label in names):
            label, number = f"{plain}-{number}", number + 1
        labels[label] = path
    return labels


def _split(argument: str) -> tuple[str | None, str]:
    """The name and the model; a path that is there, `=` and all, has no name."""
    found = _NAMED.fullmatch(argument)
    return (None, argument) if found is None or Path(argument).exists() else (found[1], found[2])
