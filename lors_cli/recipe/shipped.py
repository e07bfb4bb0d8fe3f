"""Recipes, sweeps and configs that come with lors, and the file that a name on a command line means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from lors_cli.errors import UsageError, did_you_mean, shorten

Kind = Literal["recipe", "sweep", "config"]
_PLACES: dict[Kind, str] = {"recipe": "recipes", "sweep": "recipes/sweeps", "config": "configs"}
_INSTEAD: dict[Kind, tuple[Kind, str]] = {"recipe": ("sweep", "sweep"), "sweep": ("recipe", "run")}
"""What a name that fits nothing may be, and the command for that."""
_FOLDERS = re.compile(r"^(\./)?((recipes/)?(sweeps/)?|configs/)")


def shipped_files(kind: Kind) -> dict[str, Path]:
    """What comes with lors, by name: the path below the folder of its kind without its ending (`prune/wanda`).

    From the installed package, or else from the checkout around it.
    """
    package = Path(__file__).resolve().parents[1]
    roots = [package / "_shipped" / _PLACES[kind]]
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / _PLACES[kind])
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted((*root.rglob("*.yaml"), *root.rglob("*.yml"))):
            found.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
    return {name: found[name] for name in sorted(found) if kind != "recipe" or not name.startswith("sweeps/")}


def find(kind: Kind, name: str) -> Path:
    """The file meant by a path or a shipped name (`quickstart`, `quickstart.yaml`, `recipes/quickstart.yaml`).

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    path = Path(os.path.expanduser(name))
    if name and path.exists() and not path.is_dir():
        return path
    shipped, stem = shipped_files(kind), _stem(name)
    if stem in shipped:
        return shipped[stem]
    listing = (
        f"Shipped: {', '.join(shipped) or 'none'}." if kind == "config" else "`lors recipes` lists the shipped ones."
    )
    if name and path.is_dir():
        inside = path / f"{kind}.yaml"
        hint = f"That folder's {kind} is {inside}." if inside.is_file() else f"Give a YAML file. {listing}"
        raise UsageError(f"{name} is a folder, not a {kind} file.", hint)
    if kind in _INSTEAD:
        other, command = _INSTEAD[kind]
        if stem in shipped_files(other):
            raise UsageError(f"{shorten(name)} is no {kind}.", f"For it there is: lors {command} {stem}")
    hint = " ".join(filter(None, (did_you_mean(stem.lower(), shipped), listing)))
    raise UsageError(f"There is no {kind} {shorten(name)!r}: neither a file nor a shipped {kind}.", hint)


def find_shipped_recipe(name: str) -> Path:
    """A shipped recipe's or sweep's file, whatever lies in the current folder."""
    shipped, stem = {**shipped_files("sweep"), **shipped_files("recipe")}, _stem(name)
    if stem in shipped:
        return shipped[stem]
    hint = did_you_mean(stem.lower(), shipped) or f"There are: {', '.join(shipped)}."
    raise UsageError(f"There is no shipped recipe {shorten(name)!r}.", hint)


def recipe_summary(path: Path) -> str:
    """What a recipe's first comment line says of it."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _stem(name: str) -> str:
    """A shipped file's name without its folder and ending."""
    return re.sub(r"\.ya?ml$", "", _FOLDERS.sub("", name))
