"""The arguments of `lors eval`: models, models with a name of the user's, and settings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from lors_cli.errors import UsageError, nearest


def read_arguments(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Models by the name that they have in the results, in order, and settings.

    Raises:
        UsageError: no model, a name that can be no file's or is given twice, an argument that can be read in two ways.
    """
    from lors_cli.recipe.evaluation import check_label

    models: list[tuple[str, str]] = []
    settings = []
    for argument in arguments:
        kind = reading(argument)
        if kind == "setting":
            settings.append(argument)
        else:
            name, _, path = argument.partition("=") if kind == "named" else ("", "", argument)
            models.append((name, path))
            if kind == "named":
                check_label(name)
    return _labelled(models), settings


def named_models(arguments: list[str]) -> dict[str, str]:
    """Models by name, of a command that takes no settings; a path that is there, `=` and all, has no name.

    Raises:
        UsageError: a name is given twice.
    """
    from lors_cli.recipe.evaluation import LABEL

    models = []
    for argument in arguments:
        name, _, path = argument.partition("=")
        is_named = path and LABEL.fullmatch(name) and not Path(argument).exists()
        models.append((name, path) if is_named else ("", argument))
    return _labelled(models)


def _labelled(models: list[tuple[str, str]]) -> dict[str, str]:
    """Paths by name; a name that is empty is made from the path."""
    if not models:
        raise UsageError("no model is named.", "lors eval [NAME=]MODEL … [key=value …]")
    given = [name for name, _ in models if name]
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise UsageError(f"{twice}= names two models.")
    labels: dict[str, str] = {}
    for name, path in models:
        label = own = name or _own_name(path)
        number = 2
        while not name and (label in labels or label in given):
            label, number = f"{own}-{number}", number + 1
        labels[label] = path
    return labels


def _own_name(path: str) -> str:
    from lors_cli.recipe.evaluation import TAKEN

    name = Path(path).resolve().name if Path(path).exists() else path.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", name.removesuffix(".gguf")).lstrip("._-")[:90] or "model"
    return f"{name}-model" if name in TAKEN else name


def reading(argument: str) -> Literal["model", "named", "setting"]:
    """How an argument is read: `MODEL`, `NAME=MODEL` or `KEY=VALUE`; a key of eval is always a setting.

    Raises:
        UsageError: it may be a name or a mistyped key.
    """
    from lors_cli.models.sources import PACKAGE_SCHEME
    from lors_cli.recipe.checking import field_names
    from lors_cli.recipe.schema import EvalConfig

    key, equals, value = argument.partition("=")
    if not equals or "/" in key or Path(argument).exists():
        return "model"
    known = field_names(EvalConfig)
    if key.partition(".")[0] in known:
        return "setting"
    place, close = Path(os.path.expanduser(value)), nearest(key.lower().replace("-", "_"), known, 0.75)
    if value.startswith(PACKAGE_SCHEME) or value.lower().endswith(".gguf") or (place / "config.json").is_file():
        return "named"
    is_path = "/" in value or place.is_dir()
    if is_path and not close:
        return "named"
    if not is_path and (close or not _is_word(value)):
        return "setting"  # whose check says what was perhaps meant
    meant = f"did you mean {close}={value}?" if close else "eval has none of that name (lors recipes reference)."
    raise UsageError(
        f"{argument} can be read in two ways. As a setting: {meant} As a name for a model: {value} is no folder with a "
        "model on this machine, and may be one of the hub.",
        "For a model of the hub write NAME=ORG/MODEL, with a NAME that is not like a setting's.",
    )


def _is_word(value: str) -> bool:
    """Whether YAML reads a text in it, no number, list or the like."""
    from lors_cli.recipe.yaml12 import YamlError, read

    try:
        return isinstance(read(value).data, str)
    except YamlError:
        return False
