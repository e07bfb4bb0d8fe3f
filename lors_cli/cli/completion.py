"""What the shell offers after TAB: recipe names, methods, stages, data, and files where a file will do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from lors_cli.models.shapes import SHAPES
from lors_cli.recipe.shipped import Kind, shipped_files

BENCH_METHODS = (
    "lors", "lors-cached", "lors-exact", "lors-rotating", "lors-nearest", "lors-packed", "lors-int4", "lors-qa", "sqft",
    "sqft-gc", "sqft-qa", "spp", "spp-gc", "hira", "hira-gc", "lora", "lora-float32",
)  # fmt: skip
EXAMPLES = {
    "model.device": ("auto", "cpu", "cuda", "cuda:1", "mps"), "prune.pattern": ("2:4", "4:8", "1:4", "unstructured"),
}  # fmt: skip
"""Of settings that are one of many words, some that are likely."""
Complete = Callable[[str], list[str]]


def of(*choice: str) -> Complete:
    """Offers a fixed choice."""
    return lambda incomplete: _starting(choice, incomplete)


def _shipped(kind: Kind, start: str = "") -> Complete:
    """Offers shipped names, those that begin with `start`, and YAML files."""

    def complete(incomplete: str) -> list[str]:
        names = (name for name in shipped_files(kind) if name.startswith(start))
        return _starting(names, incomplete) + _files(incomplete, (".yaml", ".yml"))

    return complete


recipes, sweeps = _shipped("recipe"), _shipped("sweep")


def shipped(incomplete: str) -> list[str]:
    """Shipped recipes and sweeps."""
    return _starting((*shipped_files("recipe"), *shipped_files("sweep")), incomplete)


def configs(stage: str) -> Complete:
    """Offers a stage's shipped configs, and YAML files."""
    return _shipped("config", f"{stage}/")


def texts(incomplete: str) -> list[str]:
    """Text sources, and files that can be one."""
    from lors_cli.data.sources import SOURCES
    from lors_cli.data.text_files import FORMATS

    return _starting(SOURCES, incomplete) + _files(incomplete, (*FORMATS, ".jsonl.gz", ".json.gz", ".txt.gz"))


def texts_list(incomplete: str) -> list[str]:
    """Text sources, comma-separated."""
    from lors_cli.data.sources import SOURCES

    return _lists(SOURCES, incomplete)


def tasks(incomplete: str) -> list[str]:
    """The built-in zero-shot tasks, comma-separated."""
    from lors_cli.recipe.schema import SEVEN_TASKS

    return _lists((*SEVEN_TASKS, "pydoc_choice"), incomplete)


def bench_methods(incomplete: str) -> list[str]:
    """What `lors bench` can time, comma-separated."""
    return _lists(BENCH_METHODS, incomplete)


def shapes(incomplete: str) -> list[str]:
    """Models whose shape `lors bench` knows."""
    return _starting(SHAPES, incomplete)


# Settings -------------------------------------------------------------------------------------------------------


OFFERS: dict[str, Complete] = {
    "prune.calibration.dataset": texts, "tune.data.dataset": texts, "eval.tasks": tasks, "eval.perplexity": texts_list,
}  # fmt: skip
"""What is offered for settings whose words the schema does not list."""


def located(key: str) -> tuple[Any, str]:
    """The schema's class that has a setting of a whole recipe, such as tune.data.packing, and its name there."""
    from lors_cli.recipe.checking import owner
    from lors_cli.recipe.schema import Recipe

    *sections, name = key.split(".")
    return owner(Recipe, sections), name


def hint(key: str) -> Any:
    """The type that the schema gives a setting of a whole recipe."""
    section, name = located(key)
    return _hints(section)[name]


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def values(key: str) -> Complete:
    """Offers what a setting of a whole recipe may be, as its flag takes it."""

    def complete(incomplete: str) -> list[str]:
        if key in OFFERS:
            return OFFERS[key](incomplete)
        kind = hint(key)
        choice = ("true", "false") if kind is bool else EXAMPLES.get(key) or words(kind)
        return (_lists if is_list(kind) else _starting)(choice, incomplete)

    return complete


def settings(stage: str | None, *, keys: bool = True) -> Callable[[typer.Context, str], list[str]]:
    """Offers `key=` for every setting of a stage (None: of a whole recipe), and after it what its value may be.

    Without `keys` only the latter: the word may as well be a file, which the shell knows.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        from lors_cli.recipe.schema import STAGE_CONFIGS, Recipe

        known = _keys(STAGE_CONFIGS[stage] if stage else Recipe)
        key, before, word = _begun(ctx, incomplete, known)
        if not key:
            return _starting((f"{each}=" for each in known), incomplete) if keys else []
        if key not in known:
            return []
        whole = f"{stage}.{key}" if stage else key
        before += "[" if is_list(hint(whole)) else ""
        return [f"{before}{value}" for value in values(whole)(word.removeprefix("["))]

    return complete


def _begun(ctx: typer.Context, incomplete: str, known: list[str]) -> tuple[str, str, str]:
    """The key whose value is being typed, what of that belongs to the last word, and the value so far.

    To bash `key=value` is three words, and only the last of them is completed.
    """
    if "=" in incomplete:
        key, _, word = incomplete.partition("=")
        return key, f"{key}=", word
    given: list[str] = []
    for param in ctx.command.params:
        if param.param_type_name == "argument":
            value = ctx.params.get(param.name or "") or ()
            given += [value] if isinstance(value, str) else value
    if given[-1:] == ["="]:
        return "".join(given[-2:-1]), "", incomplete
    return (given[-1], "", "") if given and given[-1] in known and not incomplete else ("", "", "")


def is_list(kind: Any) -> bool:
    """Whether a setting of some type is a list."""
    return get_origin(kind) is tuple or any(is_list(part) for part in get_args(kind))


def _keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted names of a schema's settings."""
    from lors_cli.recipe.checking import field_names, subsection

    found = []
    for name in field_names(schema):
        inner = subsection(schema, name)
        found += _keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


def words(kind: Any) -> list[str]:
    """The texts of every Literal in a type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [word for part in get_args(kind) for word in words(part)]


def _lists(words: Iterable[str], incomplete: str) -> list[str]:
    """A comma-separated list with its last word completed; words already there are not offered again."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [f"{before}{comma}{word}" for word in _starting(words, last) if word not in taken]


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _files(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Files with one of these endings whose path starts so; folders are the shell's, where nothing is offered."""
    folder, slash, start = incomplete.rpartition("/")
    place = Path(os.path.expanduser(f"{folder}{slash}" or "."))
    if not place.is_dir():
        return []
    return [f"{folder}{slash}{path.name}" for path in sorted(place.iterdir())
            if path.name.startswith(start) and path.name.endswith(endings) and path.is_file()]  # fmt: skip
