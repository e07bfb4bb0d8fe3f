"""What the shell offers after TAB: recipe names, methods, stages, data, and files where a file will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

BENCH_METHODS = (
    "lors", "lors-cached", "lors-nearest", "lors-compressed", "sqft", "sqft-gc", "spp", "spp-gc", "hira", "lora",
    "lora-float32",
)  # fmt: skip
Complete = Callable[[str], list[str]]


def of(*words: str) -> Complete:
    """Offers a fixed choice.

    Args:
        words: of it.
    """

    def complete(incomplete: str) -> list[str]:
        return _starting(words, incomplete)

    return complete


def setting(stage: str, name: str) -> Complete:
    """Offers the words that a stage's setting may be.

    Args:
        stage: prune, tune or eval.
        name: of the setting; the schema lists its words.
    """

    def complete(incomplete: str) -> list[str]:
        from lors_cli.recipe.schema import STAGE_CONFIGS

        return _starting(_words(get_type_hints(STAGE_CONFIGS[stage])[name]), incomplete)

    return complete


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes, and YAML files."""
    from lors_cli.recipe.shipped import shipped_recipes

    return _starting(shipped_recipes(), incomplete) + _files(incomplete, (".yaml", ".yml"))


def sweeps(incomplete: str) -> list[str]:
    """Shipped sweeps, and YAML files."""
    from lors_cli.recipe.shipped import shipped_sweeps

    return _starting(shipped_sweeps(), incomplete) + _files(incomplete, (".yaml", ".yml"))


def shipped(incomplete: str) -> list[str]:
    """Shipped recipes and sweeps."""
    from lors_cli.recipe.shipped import shipped_recipes, shipped_sweeps

    return _starting([*shipped_recipes(), *shipped_sweeps()], incomplete)


def configs(stage: str) -> Complete:
    """Offers a stage's shipped configs, and YAML files.

    Args:
        stage: prune, tune or eval.
    """

    def complete(incomplete: str) -> list[str]:
        from lors_cli.recipe.shipped import shipped_configs

        ours = [name for name in shipped_configs() if name.startswith(f"{stage}/")]
        return _starting(ours, incomplete) + _files(incomplete, (".yaml", ".yml"))

    return complete


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
    from lors_cli.models.shapes import SHAPES

    return _starting(SHAPES, incomplete)


def settings(stage: str | None) -> Complete:
    """Offers `key=` for every setting.

    Args:
        stage: prune, tune or eval, or None for a whole recipe's.
    """

    def complete(incomplete: str) -> list[str]:
        from lors_cli.recipe.schema import STAGE_CONFIGS, Recipe

        keys = [f"{key}=" for key in _keys(STAGE_CONFIGS[stage] if stage else Recipe)]
        return [] if "=" in incomplete else _starting(keys, incomplete)

    return complete


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """The dotted names of a schema's settings."""
    found = []
    hints = get_type_hints(schema)
    for entry in fields(schema):
        inner = next((kind for kind in (hints[entry.name], *get_args(hints[entry.name])) if is_dataclass(kind)), None)
        found += _keys(inner, f"{prefix}{entry.name}.") if inner else [f"{prefix}{entry.name}"]
    return found


def _words(kind: Any) -> list[str]:
    """The texts of every Literal in a type."""
    return [word for part in get_args(kind) for word in ([part] if isinstance(part, str) else _words(part))]


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
    place = Path(f"{folder}{slash}" or ".").expanduser()
    if not place.is_dir():
        return []
    return [f"{folder}{slash}{path.name}" for path in sorted(place.iterdir())
            if path.name.startswith(start) and path.name.endswith(endings) and path.is_file()]  # fmt: skip
