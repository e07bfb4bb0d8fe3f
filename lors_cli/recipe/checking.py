"""Settings against their schema: every problem at once, in plain words, each with its place."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from lors_cli.errors import shorten
from lors_cli.output.redaction import redact
from lors_cli.recipe.settings import KeyPath, Place, Settings, dotted

MAX_PASSES = 4

_SHAPES = {
    "name": "must start with a letter or digit and hold only letters, digits, `.`, `_` and `-` (100 at most)",
    "device": "must be auto, cpu, mps, cuda or cuda:N",
    "pattern": "must be N:M, for example 2:4, or unstructured",
}
_KINDS = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "finite_number": "a finite number",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"), "less_than_equal": ("at most", "le"),
}  # fmt: skip


@cache
def subsection(schema: type, key: str) -> type | None:
    """The dataclass of the field `key` of `schema`, None for a plain value or no such field."""
    hint = typing.get_type_hints(schema).get(key)
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


@cache
def field_names(schema: type) -> list[str]:
    """The keys that `schema` knows."""
    return [entry.name for entry in dataclasses.fields(schema)]


def unknown_key(schema: type, key: str, parent: KeyPath) -> str:
    """The message for a key that `schema` does not have, with the likely one meant."""
    plain = key.lower().replace("-", "_")
    inner = [path for path in _inner_keys(schema) if path[-1] == plain]
    if inner:
        return f"unknown key; did you mean {dotted((*parent, *inner[0]))}?"
    close = difflib.get_close_matches(plain[:100], field_names(schema), n=1)
    if close:
        return f"unknown key; did you mean {close[0]}?"
    return f"unknown key; known here: {', '.join(field_names(schema))}"


def _inner_keys(schema: type) -> Iterator[tuple[str, ...]]:
    """Key paths in the sections below `schema`, and its own."""
    for key in field_names(schema):
        yield (key,)
        section = subsection(schema, key)
        if section:
            yield from ((key, *path) for path in _inner_keys(section))


def check(schema: type, settings: Settings) -> Any:
    """The settings as an instance of `schema`.

    Args:
        schema: a dataclass of `lors_cli.recipe.schema`.
        settings: data with its places.

    Returns:
        The instance.

    Raises:
        UsageError: with every problem, in the order of the places.
    """
    from pydantic import ValidationError

    adapter = _adapter(schema)
    _refuse_secrets(settings)
    data, mended = copy.deepcopy(settings.data), set[str]()
    for _ in range(MAX_PASSES):
        try:
            result = adapter.validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            errors: list[Any] = error.errors(include_url=False)
        else:
            break
        errors.sort(key=lambda entry: settings.place(entry["loc"]).order)
        for entry in errors:
            _report(schema, settings, entry, mended)
        # What could not be used is replaced, so that the rules between keys are checked in this run too.
        for entry in errors:
            mended.update(_mend(schema, data, entry["loc"], entry["type"]))
    settings.fail()
    return result


def _refuse_secrets(settings: Settings) -> None:
    """Settings are stored with a run's results, so a token or password may not be among them."""

    def look(path: KeyPath, value: Any) -> None:
        if isinstance(value, str) and redact(value) != value:
            settings.add(path, "holds a token or a password; give it by HF_TOKEN or `hf auth login`, never in settings")
        for key, inner in value.items() if isinstance(value, dict) else ():
            look((*path, key), inner)
        for index, inner in enumerate(value) if isinstance(value, list) else ():
            look((*path, index), inner)

    look((), settings.data)


@cache
def _adapter(schema: type) -> Any:
    """pydantic's checker of a schema, which takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _report(schema: type, settings: Settings, entry: Any, mended: set[str]) -> None:
    path, kind = entry["loc"], entry["type"]
    if kind == "value_error":
        rule = str(entry["ctx"]["error"])
        if not any(key in rule for key in mended):
            _report_rule(settings, path, rule)
    elif kind == "too_short" and entry["input"]:
        return  # pydantic counts only the good items; the bad ones have messages of their own
    elif kind == "unexpected_keyword_argument":
        owner = _owner(schema, path[:-1])
        settings.add(path, unknown_key(owner, str(path[-1]), path[:-1]))
    else:
        settings.add(path, describe(path, entry, settings.raws.get(path)))


def _report_rule(settings: Settings, path: KeyPath, rule: str) -> None:
    """A rule between keys, put at the key it starts with, or at the last override among its keys."""
    words = [tuple(word.split(".")) for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", rule)]
    given = [(*path, *word) for word in words if (*path, *word) in settings.places]
    subject = re.match(r"([a-z_.]+): ", rule)
    places = [settings.place(key) for key in given]
    from_command_line = [place for place in places if place.order[0] > 0]
    place = max(from_command_line, key=lambda p: p.order, default=places[0] if places else settings.place(path))
    if subject:
        path = (*path, *subject.group(1).split("."))
        rule = rule[subject.end() :]
        place = Place(place.label, place.order)  # the rule's subject is always named
    settings.add(path, rule, place)


def _owner(schema: type, path: KeyPath) -> type:
    for key in path:
        schema = subsection(schema, str(key)) or schema
    return schema


def _mend(schema: type, data: Any, path: KeyPath, kind: str) -> set[str]:
    """Replace what is wrong at `path` by something that passes; gives the keys touched."""
    if not path:  # a rule of the recipe as a whole: nothing is left to check after it
        return set()
    section = data
    for key in path[:-1]:
        if subsection(schema, str(key)) is None:
            path = path[: path.index(key) + 1]
            break
        section, schema = section[key], subsection(schema, str(key)) or schema
    key = str(path[-1])
    required = {entry.name: entry.default is entry.default_factory for entry in dataclasses.fields(schema)}
    if subsection(schema, key):
        section[key] = {"path": "x"} if key == "model" else {}
    elif required.get(key):
        section[key] = "x"
    else:
        section.pop(key, None)
    return {key}


def describe(path: KeyPath, entry: Any, raw: str | None) -> str:
    """A pydantic error in plain words.

    Args:
        path: of the value.
        entry: the error, as `ValidationError.errors()` has it.
        raw: the value as written, when it was unquoted.

    Returns:
        What the value must be, and what it is.
    """
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    got = _shown(value, raw)
    if kind == "missing":
        return "this key is missing"
    if value is None:
        return "is empty; give a value, or remove the key to use the default"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        close = difflib.get_close_matches(str(value).lower()[:100], choices, n=1)
        ending = f"; did you mean {close[0]}?" if close else ""
        return f"must be one of {', '.join(choices)}, not {got}{ending}"
    if kind in ("string_type", "string_pattern_mismatch"):
        scalar = isinstance(value, (int, float))
        if kind == "string_type" and scalar and path[-1] not in ("device", "pattern"):
            return f"must be text; put it in quotes: '{raw or value}'"
        return f"{_SHAPES.get(str(path[-1]), 'must be text')}, not {got}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {got}"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"must be {word} {context[bound]:g}, not {got}"
    if kind == "string_too_short":
        return "must not be an empty text"
    if kind == "too_short":
        return "must have at least one entry"
    if kind == "tuple_type":
        return f"must be a list, for example [{got}]" if isinstance(value, str) else f"must be a list, not {got}"
    if kind == "dataclass_type":
        return f"must be a section with keys of its own, not {got}"
    return f"{entry['msg']}, not {got}"


def _shown(value: Any, raw: str | None) -> str:
    if isinstance(value, dict):
        return "a section with keys"
    if isinstance(value, list):
        return "a list"
    text = raw if raw is not None else str(value)
    return shorten(text) if text else "an empty text"
