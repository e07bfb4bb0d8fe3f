"""lm-eval's task definitions: which names there are, and what a definition says, without importing lm-eval.

Names are found by a scan of the YAML files' text, about a second; lm-eval's own TaskManager parses all 14,000 of them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lors_cli.errors import MissingError, UsageError

_NAME_LINE = re.compile(r"""^["']?(task|group|class)["']?[ \t]*:[ \t]*["']?([^\s"'#\[]*)""", re.MULTILINE)
_TAG_LINE = re.compile(
    r"""^["']?tag["']?[ \t]*:[ \t]*(\[[^\]]*\]|[^\s#\[]\S*)?((?:[ \t]*(?:#.*)?\n[ \t]*-[ \t]*\S+)*)""", re.MULTILINE
)
_INCLUDE_LINE = re.compile(r"""^["']?include["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)

_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders that lm-eval does not look into."""


@dataclass
class TaskNames:
    """What the definitions in a folder define."""

    tasks: dict[str, Path] = field(default_factory=dict)
    """Task to its YAML file."""
    groups: dict[str, Path] = field(default_factory=dict)
    """Group to its YAML file."""
    tags: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Tag to the tasks that carry it."""


@functools.cache
def tasks_folder() -> Path:
    """lm-eval's folder of definitions, without importing lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise MissingError("The package lm-eval is not installed.", "pip install lm-eval==0.4.13")
    return Path(spec.origin).parent / "tasks"


_Found = TypeVar("_Found")


def _kept_of_lm_evals(find: Callable[[Path], _Found]) -> Callable[[Path], _Found]:
    """Keeps what is found in lm-eval's folder; a folder of the user's may change while a notebook runs."""
    kept = functools.cache(find)

    @functools.wraps(find)
    def found(path: Path) -> _Found:
        return kept(path) if path.is_relative_to(tasks_folder()) else find(path)

    return found


@_kept_of_lm_evals
def names_in(root: Path) -> TaskNames:
    """Every name that the definitions below `root` define; the first of two files of the same name counts."""
    names, found = TaskNames(), []
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - _SKIPPED
        found += [f"{folder}/{file}" for file in files if file.endswith(".yaml")]
    for file in sorted(found):
        _scan(Path(file), names)
    return names


def _scan(path: Path, names: TaskNames) -> None:
    text = _text(path)
    found = dict(_NAME_LINE.findall(text))
    group, task, is_task = found.get("group"), found.get("task"), "class" in found or "group" not in found
    if not is_task and group and group not in names.tasks:
        names.groups.setdefault(group, path)
    if is_task and task and task not in names.groups and names.tasks.setdefault(task, path) == path:
        for tag in _tags(path, text):
            names.tags[tag].append(task)


def _tags(path: Path, text: str) -> list[str]:
    """The tags of a definition: its own, else those of what it includes."""
    own = _TAG_LINE.search(text)
    if own:
        return re.findall(r"[^\s\[\],\"'-][^\s\[\],\"']*", " ".join(part or "" for part in own.groups()))
    included = [path.parent / name for name in _INCLUDE_LINE.findall(text)]
    return [tag for file in included if file.is_file() for tag in _tags(file, _text(file))]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def definition_text(path: Path) -> list[str]:
    """The file's text and that of every file it includes.

    Raises:
        UsageError: as `read_definition`.
    """
    texts = [file.read_text(encoding="utf-8", errors="replace") for file, _ in _parts(path.resolve(), ())]
    return texts[::-1]


@_kept_of_lm_evals
def read_definition(path: Path) -> dict[str, Any]:
    """A definition with what it includes merged in; a `!function` is the path of its module and its name.

    Raises:
        UsageError: it is no YAML mapping, or includes itself or what is not there.
    """
    merged: dict[str, Any] = {}
    for _, content in _parts(path.resolve(), ()):
        merged |= content
    return merged


def _parts(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that a definition includes, one or a list, and then itself, each with its own content."""
    import yaml

    if path in above:
        raise UsageError(f"{path} includes itself.")
    try:
        content = yaml.load(path.read_bytes(), _loader(path.parent))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a task's definition: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no task's definition: it has no keys.")
    included = content.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        yield from _parts((path.parent / name).resolve(), (*above, path))
    yield path, content


def _loader(folder: Path) -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """YAML with lm-eval's !function."""

    Loader.add_constructor("!function", lambda loader, node: f"!function {folder / loader.construct_scalar(node)}")
    return Loader
