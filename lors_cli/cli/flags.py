"""The flags that stand for settings of a recipe: what each takes, its help and its default come from the schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from lors_cli.cli.completion import EXAMPLES, hint, is_list, section, values, words
from lors_cli.cli.options import CALIBRATION, MACHINE, SETTINGS, TRAINING, option

FLAGS: dict[str, dict[str, dict[str, str]]] = {
    "model": {MACHINE: {"device": "device", "dtype": "dtype", "revision": "revision"}},
    "prune": {
        SETTINGS: {"method": "method", "pattern": "pattern", "sparsity": "sparsity"},
        CALIBRATION: {
            "calibration": "calibration.dataset", "num_samples": "calibration.num_samples",
            "sequence_length": "calibration.sequence_length", "seed": "calibration.seed",
        },
    },
    "tune": {
        SETTINGS: {"method": "method", "rank": "rank", "alpha": "alpha", "init": "init"},
        TRAINING: {
            "dataset": "data.dataset", "max_length": "data.max_length", "learning_rate": "learning_rate",
            "epochs": "epochs", "max_steps": "max_steps", "max_tokens": "max_tokens", "batch_size": "batch_size",
            "seed": "seed",
        },
    },
    "eval": {SETTINGS: {"tasks": "tasks", "perplexity": "perplexity", "limit": "limit", "batch_size": "batch_size"}},
}  # fmt: skip
"""By section of a recipe and panel of the help: flag → setting. A flag of two words, a_b, is --a-b."""

LONGEST = 130
"""Characters of a description that fits into the help of a flag."""
NOTES = {"prune.sparsity": "Alone it means unstructured."}
"""What a flag does that its setting does not."""


def given(name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section that flags were given for, by key in it; a flag that was not given is None."""
    found = {key: flags[flag] for panel in FLAGS[name].values() for flag, key in panel.items()}
    return {key: split_list(value) if is_list(hint(f"{name}.{key}")) else value
            for key, value in found.items() if value is not None}  # fmt: skip


def split_list(text: str) -> list[str]:
    """The words between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parameters(sections: Iterable[str]) -> list[inspect.Parameter]:
    """The flags of some sections, as a command's parameters."""
    return [
        _parameter(flag, f"{name}.{key}", panel)
        for name in sections
        for panel, flags in FLAGS[name].items()
        for flag, key in flags.items()
    ]


def _parameter(flag: str, key: str, panel: str) -> inspect.Parameter:
    shown = option(_help(key), f"--{flag.replace('_', '-')}", panel=panel, complete=values(key))
    kind = Annotated[_kind(hint(key)) | None, shown]  # type: ignore[valid-type]
    return inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _kind(kind: Any) -> type:
    """What a flag takes for a setting of some type: a number or a text.

    A whole number that has a validator of its own may be written as 0.5e9 too, so it is taken as any number.
    """
    if get_origin(kind) is Annotated:
        kind, *rules = get_args(kind)
        return float if kind is int and any(hasattr(rule, "func") for rule in rules) else _kind(kind)
    if type(None) in get_args(kind):
        return _kind(get_args(kind)[0])
    return kind if kind in (int, float) else str


def _help(key: str) -> str:
    """A setting's description, of a long one the first sentence without asides; its words; its default."""
    from rich.markup import escape

    sentences = re.split(r"(?<=[.]) (?=[A-Z])", _descriptions(section(key))[key.rpartition(".")[2]])
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
    default = {entry.name: entry.default for entry in dataclasses.fields(section(key))}[key.rpartition(".")[2]]
    if default is None:
        parts += [sentence for sentence in sentences if sentence.startswith("Default")]
    elif default != ():
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
