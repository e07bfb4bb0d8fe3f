"""`lors recipes reference`: every setting of a recipe, from the schema, as Markdown or as plain values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lors_cli.recipe.checking import field_names, listed_section, subsection
from lors_cli.recipe.loading import recipe_schema
from lors_cli.recipe.rules import RULES
from lors_cli.recipe.schema import Recipe


def _sections(kind: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield ".".join(path), kind
    for name in field_names(kind):
        if inner := subsection(kind, name) or listed_section(kind, name):
            yield from _sections(inner, (*path, name))


SECTIONS = dict(_sections(Recipe))
KINDS = {
    "name": "letters, digits, `.`, `_`, `-`; at most 100",
    "model.device": "`auto`, `cpu`, `mps`, `cuda`, `cuda:N`",
    "prune.pattern": "`N:M`, `unstructured`",
}
"""In words, what the schema says by a regular expression."""

_HEAD = """\
# Settings of a recipe

<!-- Generated: lors recipes reference > docs/recipe.md -->

A recipe is a YAML file with a `name`, a `model` and one or more of the stages `prune`, `tune`, `pack`, `eval`. On the
command line any setting is given as `key=value`, its value in YAML:
`lors run mine.yaml tune.rank=32 eval.tasks=[boolq,rte]`. A single stage's settings, on the command line and in the file
of `--config`, are relative to the stage: `lors tune sparse --out tuned rank=32 data.max_length=1024`.

Unknown or doubled keys, wrong types and impossible values are all reported at once, with file and line. `2:4` and
`2e-5` are read as they look. Where the default is —, the setting may be left out, and its text says what then holds.
`lors recipes schema` prints the same as a JSON Schema for editors.
"""


@dataclass(frozen=True)
class Setting:
    """One dotted key of a recipe; `kind` is what it may be, in words."""

    key: str
    kind: str
    default: str | None
    """As YAML would have it; None when it must be given, or may be left out."""
    required: bool
    description: str


def settings() -> list[Setting]:
    """Every setting, section by section, in the schema's order."""
    schema, found = recipe_schema(), []
    for section, kind in SECTIONS.items():
        part = schema if kind is Recipe else schema["$defs"][kind.__name__]
        for name, entry in part["properties"].items():
            key = f"{section}.{name}" if section else name
            is_required = name in part.get("required", ())
            words = KINDS.get(key) or _kind(entry)
            found.append(Setting(key, words, _default(entry.get("default")), is_required, entry["description"]))
    return found


def markdown() -> str:
    """The page docs/recipe.md."""
    by_section: dict[str, list[Setting]] = {section: [] for section in SECTIONS}
    for setting in settings():
        by_section[setting.key.rpartition(".")[0]].append(setting)
    parts = [_HEAD, *(_section(section, found) for section, found in by_section.items())]
    return "\n".join(parts)


def _section(section: str, found: list[Setting]) -> str:
    title = f"`{section}`" if section else "The recipe itself"
    lines = [f"## {title}", "", " ".join(str(SECTIONS[section].__doc__).split()), ""]
    head = ["| key | value | default | |", "|---|---|---|---|"]
    lines += head if found else [f"It has no settings: `{section}: {{}}`."]
    for setting in found:
        default = "required" if setting.required else "—" if setting.default is None else f"`{setting.default}`"
        name = setting.key.rpartition(".")[2]
        name = f"[{name}](#{setting.key.replace('.', '')})" if setting.key in SECTIONS else f"`{name}`"
        description = re.sub(r"\$[A-Z_]+", r"`\g<0>`", setting.description)  # no formula
        cells = (name, setting.kind, default, description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    said = dict.fromkeys(rule for *_, rule in RULES.get(SECTIONS[section].__name__, ()))
    lines += ["", *(f"- {rule}" for rule in said)] if said else []
    return "\n".join([*lines, ""])


def _default(value: Any) -> str | None:
    """A default in YAML; None where there is none, or it is said in the description."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(schema: dict[str, Any]) -> str:
    """What a setting may be, in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "$ref" in schema:
        return "a section"
    if "enum" in schema:
        return ", ".join(f"`{word}`" for word in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}"
    if schema["type"] == "object":
        return f"a {_kind(schema['additionalProperties'])} by name"
    if schema["type"] == "boolean":
        return "`true`, `false`"
    return {"integer": "whole number", "number": "number", "string": "text"}[schema["type"]] + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    said = [
        f"{word} {'2³²' if schema[name] == 2**32 else format(schema[name], 'g')}"
        for name, word in words.items()
        if name in schema
    ]
    return f" {', '.join(said)}" if said else ""
