"""Layers that a stage leaves as they are, by globs over their full names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lors_cli.errors import UsageError, shorten
from lors_cli.output import console
from lors_cli.output.console import counted

SHOWN = 3
"""Names that a line of the log and a message give."""


def skipped(globs: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of the names that a glob matches, in their order.

    Args:
        globs: `*` is any text, dots too; `?` one character; `[0-3]` one of several.
        names: of all weights that could be meant.

    Raises:
        UsageError: a glob matches none of them, or all are matched.
    """
    known = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            near = get_close_matches(glob, _candidates(glob, known), n=SHOWN, cutoff=0.0)
            raise UsageError(f"skip: {shorten(glob)} is the name of no layer that could be skipped.",
                             f"Near it are {', '.join(near)}.")  # fmt: skip
    found = [name for name in known if is_skipped(name, globs)]
    if known and len(found) == len(known):
        raise UsageError(f"skip: {', '.join(map(shorten, globs))} leaves no layer to work on.", "Skip fewer.")
    return found


def is_skipped(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches a name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def say_skipped(names: Sequence[str], why: str) -> None:
    """A line of the log on what is left out, if anything is."""
    if names:
        more = ", …" if len(names) > SHOWN else ""
        console.info(f"  skipped: {counted(len(names), 'layer')} {why}: {', '.join(names[:SHOWN])}{more}")


def _candidates(glob: str, names: Sequence[str]) -> list[str]:
    """What may have been meant: names, or where a glob was typed, globs that match something."""
    if not re.search(r"[*?[]", glob):
        return list(names)
    return list(dict.fromkeys(each for name in names for each in _globs(name)))


def _globs(name: str) -> Iterator[str]:
    """The ends of a name, and its starts down to a block or further."""
    parts = name.split(".")
    yield from (f"*.{'.'.join(parts[place:])}" for place in range(1, len(parts)))
    yield from (f"{'.'.join(parts[:place])}.*" for place in range(1, len(parts)))
