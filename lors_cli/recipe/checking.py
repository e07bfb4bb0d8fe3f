"""Settings against their schema: every problem at once, in plain words, each with its place."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lors_cli.errors import SURROGATE, nearest, shorten
from lors_cli.output.redaction import redact
from lors_cli.recipe.rules import broken
from lors_cli.recipe.settings import KeyPath, Place, Settings, dotted

IS_CHECKING: ContextVar[bool] = ContextVar("is_checking", default=False)
"""Whether sections are being made by `check`, so that they need not check themselves."""
MAX_LISTED = 12
"""Keys of a section that a message names all of."""
_ELSEWHERE = {
    "lr": "learning_rate", "lora_r": "rank", "r": "rank", "lora_alpha": "alpha", "num_epochs": "epochs",
    "num_train_epochs": "epochs", "cutoff_len": "max_length", "max_seq_length": "max_length", "bs": "batch_size",
    "train_batch_size": "batch_size", "micro_batch_size": "per_device_batch_size",
    "per_device_train_batch_size": "per_device_batch_size", "nsamples": "num_samples", "seqlen": "sequence_length",
    "sparsity_ratio": "sparsity",
}  # fmt: skip
"""What other trainers and pruners call our settings."""
SHAPES = {
    "name": "must start with a letter or digit and hold only letters, digits, `.`, `_` and `-` (100 at most)",
    "device": "must be auto, cpu, mps, cuda or cuda:N",
    "pattern": "must be N:M, for example 2:4, or unstructured",
}
_SAID = {
    "missing": "this key is missing", "string_too_short": "must not be an empty text",
    "too_short": "must have at least one entry",
}  # fmt: skip
_MUST_BE = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "finite_number": "a finite number", "tuple_type": "a list",
    "greater_than": "above {gt:g}", "greater_than_equal": "at least {ge:g}", "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}", "dataclass_type": "a section with keys of its own",
}  # fmt: skip
"""By pydantic's name of an error; in braces what it tells with it."""


@cache
def subsection(schema: type, key: str) -> type | None:
    """The dataclass of the field `key` of `schema`, None for a plain value or no such field."""
    hint = typing.get_type_hints(schema).get(key)
    return _section_in(hint) if typing.get_origin(hint) is not tuple else None


@cache
def listed_section(schema: type, key: str) -> type | None:
    """The dataclass of the entries of a list, the field `key` of `schema`; None for anything else."""
    hint = typing.get_type_hints(schema).get(key)
    return _section_in(hint) if typing.get_origin(hint) is tuple else None


def _section_in(hint: Any) -> type | None:
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def owner(schema: type, path: Iterable[str | int]) -> type:
    """The dataclass of the section at `path` below `schema`."""
    for key in path:
        schema = subsection(schema, str(key)) or listed_section(schema, str(key)) or schema
    return schema


@cache
def field_names(schema: type) -> list[str]:
    """The keys that `schema` knows."""
    return [entry.name for entry in dataclasses.fields(schema)]


def unknown_key(schema: type, key: str, parent: KeyPath, prefix: str = "") -> str:
    """The message for a key that `schema` does not have, with the likely one meant (`prefix` goes before it)."""
    plain = key.lower().replace("-", "_")
    if plain in ("target_modules", "lora_target_modules"):
        return "unknown key; every pruned linear gets an adapter, there is no choice to make"
    if plain == "data_dir" and not parent:  # a recipe's, in a stage's settings
        return "unknown key; write --data-dir FOLDER"
    plain = _ELSEWHERE.get(plain, plain)
    inner = sorted((path for path in _inner_keys(schema) if path[-1] == plain), key=len)
    if inner:
        return f"unknown key; did you mean {dotted((*parent, *inner[0]))}?"
    close = nearest(plain, field_names(schema))
    if close:
        return f"unknown key; did you mean {prefix}{close}?"
    if not field_names(schema):
        return f"unknown key; {parent[-1] if parent else 'it'} has no settings: write {{}}"
    if len(field_names(schema)) <= MAX_LISTED:
        return f"unknown key; known here: {', '.join(field_names(schema))}"
    likely = difflib.get_close_matches(plain[:100], field_names(schema), n=3, cutoff=0.0)
    return f"unknown key; the nearest here are {', '.join(likely)} (all: lors recipes reference)"


def _inner_keys(schema: type) -> Iterator[tuple[str, ...]]:
    """Key paths in the sections below `schema`, and its own."""
    for key in field_names(schema):
        yield (key,)
        section = subsection(schema, key) or listed_section(schema, key)
        if section:
            yield from ((key, *path) for path in _inner_keys(section))


def check(schema: type, settings: Settings) -> Any:
    """The settings as an instance of `schema`, or a UsageError with every problem in the order of the places."""
    _refuse_what_no_record_may_hold(settings)
    token = IS_CHECKING.set(True)
    try:
        result = _adapter(schema).validate_json(json.dumps(settings.data, default=repr), strict=True)
    except ValidationError as error:
        errors = [entry for entry in error.errors(include_url=False) if entry["type"] != "value_error"]
        for entry in sorted(errors, key=lambda entry: settings.place(entry["loc"]).order):
            _report(schema, settings, entry)
        _check_rules(schema, settings.data, settings, {dotted(entry["loc"]) for entry in errors})
        settings.fail()
        raise
    finally:
        IS_CHECKING.reset(token)
    settings.fail()
    return result


_adapter: Any = cache(TypeAdapter)  # which takes longer to make than to use


def _refuse_what_no_record_may_hold(settings: Settings) -> None:
    """Settings are stored with a run's results: no token or password may be among them, nor half a character.

    Raises:
        UsageError: a text is not UTF-8, such as a file's name; nothing more can then be checked.
    """

    def look(path: KeyPath, value: Any) -> None:
        if isinstance(value, str) and redact(value) != value:
            settings.add(path, "holds a token or a password; give it by HF_TOKEN or `hf auth login`, never in settings")
        if isinstance(value, str) and SURROGATE.search(value):
            wrong.append(path)
            settings.add(path, f"is not UTF-8: {shorten(value)}")
        for key, inner in value.items() if isinstance(value, dict) else ():
            look((*path, key), inner)
        for index, inner in enumerate(value) if isinstance(value, list) else ():
            look((*path, index), inner)

    wrong: list[KeyPath] = []
    look((), settings.data)
    if wrong:
        settings.fail()


def _report(schema: type, settings: Settings, entry: Any) -> None:
    path, kind = entry["loc"], entry["type"]
    if kind == "too_short" and entry["input"]:
        return  # pydantic counts only the good items; the bad ones have messages of their own
    if kind == "unexpected_keyword_argument":
        settings.add(path, unknown_key(owner(schema, path[:-1]), str(path[-1]), path[:-1]))
    else:
        settings.add(path, describe(path, entry, settings.raws.get(path)))


def _check_rules(schema: type, data: dict[str, Any], settings: Settings, wrong: set[str], path: KeyPath = ()) -> Any:
    """Report the rules that are broken between keys of which none is wrong itself.

    Gives an unchecked instance of `schema` from what is right in `data`, the rest as if it were not given.
    """
    made: Any = object.__new__(schema)
    for entry in dataclasses.fields(schema):
        key, section = (*path, entry.name), subsection(schema, entry.name)
        is_wrong = dotted(key) in wrong
        if entry.name in data and not is_wrong:
            value = data[entry.name]
        elif section:
            value = {} if is_wrong or entry.default is dataclasses.MISSING else None
        else:
            value = getattr(schema, entry.name, None)
        if section and value is not None:
            value = _check_rules(section, value, settings, wrong, key)
        if (entries := listed_section(schema, entry.name)) and value:
            made_of = enumerate(value if isinstance(value, (list, tuple)) else ())
            value = tuple(_check_rules(entries, part, settings, wrong, (*key, index)) for index, part in made_of
                          if isinstance(part, dict))  # fmt: skip
        object.__setattr__(made, entry.name, value)
    for subject, message in broken(made):
        words = re.findall(r"[a-z_]+(?:\.[a-z_]+)*", f"{subject} {message}")
        named = [(*path, *word.split(".")) for word in words]
        if wrong.isdisjoint(map(dotted, named)):
            _report_rule(settings, path, subject, message, [key for key in named if key in settings.places])
    return made


def _report_rule(settings: Settings, path: KeyPath, subject: str, message: str, given: list[KeyPath]) -> None:
    """A rule between keys, put at the first of those given, or at the last override among them."""
    places = [settings.places[key] for key in given] or [settings.place(path)]
    place = max((place for place in places if place.order[0] > 0), key=lambda p: p.order, default=places[0])
    if subject:
        path = (*path, *subject.split("."))
        place = Place(place.label, place.order)  # the rule's subject is always named
    settings.add(path, message, place)


def describe(path: KeyPath, entry: Any, raw: str | None) -> str:
    """A pydantic error in plain words: what the value must be, and what it is (`raw`: as written, when unquoted)."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    got = _shown(value, raw)
    if kind in _SAID:
        return _SAID[kind]
    if value is None:
        return "is empty; give a value, or remove the key to use the default"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        close = nearest(str(value).lower(), choices)
        ending = f"; did you mean {close}?" if close else ""
        return f"must be one of {', '.join(choices)}, not {got}{ending}"
    if kind in ("string_type", "string_pattern_mismatch"):
        scalar = isinstance(value, (int, float))
        if kind == "string_type" and scalar and path[-1] not in ("device", "pattern"):
            return f"must be text; put it in quotes: '{raw or value}'"
        return f"{SHAPES.get(str(path[-1]), 'must be text')}, not {got}"
    if kind == "tuple_type" and isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()] or [value]
        shown = (part if re.fullmatch(r"[\w./-]+", part) else json.dumps(part) for part in parts)  # a star wants quotes
        return f"must be a list, for example [{', '.join(shown)}]"
    if kind in _MUST_BE:
        got = f"the text {got!r}" if isinstance(value, str) and raw is None else got
        return f"must be {_MUST_BE[kind].format(**context)}, not {got}"
    return f"{entry['msg']}, not {got}"


def _shown(value: Any, raw: str | None) -> str:
    if isinstance(value, dict):
        return "a section with keys"
    if isinstance(value, list):
        return "a list"
    text = raw if raw is not None else str(value)
    return shorten(text) if text else "an empty text"
