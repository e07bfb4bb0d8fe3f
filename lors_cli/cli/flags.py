"""The flags that stand for settings of a recipe: what each takes, its help and its default come from the schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from rich.markup import escape

from lors_cli.cli.completion import EXAMPLES, hint, is_list, located, values, words
from lors_cli.cli.options import CALIBRATION, MACHINE, SETTINGS, TRAINING, flag
from lors_cli.recipe.settings import flag_name

FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {MACHINE: ("device", "dtype", "revision", "add_bos_token")},
    "prune": {
        SETTINGS: ("method", "pattern", "sparsity", "skip"),
        CALIBRATION: ("calibration.dataset", "calibration.num_samples", "calibration.sequence_length",
                      "calibration.seed"),
    },
    "tune": {
        SETTINGS: ("method", "rank", "alpha", "init", "skip"),
        TRAINING: ("data.dataset", "data.max_length", "learning_rate", "epochs", "max_steps", "max_tokens",
                   "batch_size", "seed"),
    },
    "pack": {},
    "eval": {SETTINGS: ("tasks", "perplexity", "limit", "num_fewshot", "apply_chat_template", "batch_size")},
}  # fmt: skip
"""By section of a recipe and panel of the help, the settings that have a flag, `flag_name`."""

LONGEST = 130
"""Characters of a description that fits into the help of a flag."""
NOTES = {"prune.sparsity": "Alone it means unstructured."}
"""What a flag does that its setting does not."""


def given(name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section that flags were given for, by key in it; a flag that was not given is None."""
    found = {key: flags[flag_name(key)] for keys in FLAGS[name].values() for key in keys}
    return {key: split_list(value) if is_list(hint(f"{name}.{key}")) else value
            for key, value in found.items() if value is not None}  # fmt: skip


def split_list(text: str) -> list[str]:
    """The words between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parameters(sections: Iterable[str]) -> list[inspect.Parameter]:
    """The flags of some sections, as a command's parameters."""
    found = []
    for section in sections:
        for panel, names in FLAGS[section].items():
            for name in names:
                key = f"{section}.{name}"
                kind = _kind(hint(key))
                found.append(flag(flag_name(name), kind | None, None, _help(key), panel, values(key),
                                  switch=hint(key) is bool))  # fmt: skip
    return found


def _kind(kind: Any) -> type:
    """What a flag takes for a setting of some type: a number or a text.

    A whole number that has a validator of its own may be written as 0.5e9 too, so it is taken as any number.
    """
    if get_origin(kind) is Annotated:
        kind, *rules = get_args(kind)
        return float if kind is int and any(hasattr(rule, "func") for rule in rules) else _kind(kind)
    if get_origin(kind) in (Union, UnionType):
        return _kind(get_args(kind)[0])
    return kind if kind in (int, float, bool) else str


def _help(key: str) -> str:
    """A setting's description, of a long one the first sentence without asides; its words; its default."""
    section, name = located(key)
    sentences = re.split(r"(?<=[.]) (?=[A-Z])", _descriptions(section)[name])
    said = [sentence for sentence in sentences if not sentence.startswith("Default")]
    parts = said if len(" ".join(said)) <= LONGEST else [re.sub(r" \([^()]*\)", "", said[0])]
    kind = hint(key)
    if choice := words(kind):
        parts.append(f"One of {', '.join(choice)}.")
    if key in EXAMPLES:
        parts.append(f"Such as {', '.join(EXAMPLES[key])}.")
    if is_list(kind):
        parts.append("Several with commas, '' for none.")
    if key in NOTES:
        parts.append(NOTES[key])
    default = next(entry.default for entry in dataclasses.fields(section) if entry.name == name)
    if default is None:
        parts += [sentence for sentence in sentences if sentence.startswith("Default")]
    elif default != () and default is not False:
        parts.append(f"Default: {_shown(default)}.")
    return escape(" ".join(parts))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def _descriptions(schema: Any) -> dict[str, str]:
    """The docstrings of a section's settings, each on one line."""
    from pydantic import TypeAdapter

    properties = TypeAdapter(schema).json_schema()["properties"]
    return {name: " ".join(entry["description"].split()) for name, entry in properties.items()}
