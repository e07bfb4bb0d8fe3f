"""Recipes, sweeps and configs that come with lors, and the file that a name on a command line means."""

from __future__ import annotations

import re
from pathlib import Path

from lors_cli.errors import UsageError, nearest, shorten


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with lors, by name: the path below `recipes/` without its ending."""
    return {name: path for name, path in _shipped("recipes").items() if not name.startswith("sweeps/")}


def shipped_sweeps() -> dict[str, Path]:
    """The sweeps that come with lors, by name: the path below `recipes/sweeps/` without its ending."""
    return _shipped("recipes/sweeps")


def shipped_configs() -> dict[str, Path]:
    """The single-stage configs that come with lors, by name, such as `prune/wanda`."""
    return _shipped("configs")


def find_recipe(name: str) -> Path:
    """The recipe file meant by a path or a shipped name (`quickstart`, `quickstart.yaml`, `recipes/quickstart.yaml`).

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    return _find(name, shipped_recipes(), "recipe", "`lors recipes` lists the shipped ones.")


def find_sweep(name: str) -> Path:
    """The sweep file meant by a path or a shipped name (`smollm2`, `sweeps/smollm2.yaml`).

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    return _find(name, shipped_sweeps(), "sweep", "`lors recipes` lists the shipped ones.")


def find_shipped_recipe(name: str) -> Path:
    """A shipped recipe's or sweep's file, whatever lies in the current folder.

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    shipped = {**shipped_sweeps(), **shipped_recipes()}
    stem = _stem(name)
    if stem in shipped:
        return shipped[stem]
    close = nearest(stem.lower(), shipped)
    hint = f"Did you mean {close}?" if close else f"There are: {', '.join(shipped)}."
    raise UsageError(f"There is no shipped recipe {shorten(name)!r}.", hint)


def recipe_summary(path: Path) -> str:
    """What a recipe's first comment line says of it."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def find_config(name: str) -> Path:
    """The config file meant by `--config`: a path or a shipped name such as `prune/wanda`.

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    return _find(name, shipped_configs(), "config", f"Shipped: {', '.join(shipped_configs()) or 'none'}.")


_FOLDERS = re.compile(r"^(\./)?((recipes/)?(sweeps/)?|configs/)")
_OTHER_COMMANDS = {"recipe": ("sweep", shipped_sweeps), "sweep": ("run", shipped_recipes)}
"""What a name that fits nothing may be instead: the command for it, and the names that it takes."""


def _stem(name: str) -> str:
    """A shipped file's name without its folder and ending."""
    return re.sub(r"\.ya?ml$", "", _FOLDERS.sub("", name))


def _find(name: str, shipped: dict[str, Path], what: str, listing: str) -> Path:
    path = Path(name).expanduser()
    if name and path.exists() and not path.is_dir():
        return path
    stem = _stem(name)
    if stem in shipped:
        return shipped[stem]
    if name and path.is_dir():
        inside = path / f"{what}.yaml"
        hint = f"That folder's {what} is {inside}." if inside.is_file() else f"Give a YAML file. {listing}"
        raise UsageError(f"{name} is a folder, not a {what} file.", hint)
    command, others = _OTHER_COMMANDS.get(what, ("", dict))
    if stem in others():
        raise UsageError(f"{shorten(name)} is no {what}.", f"For it there is: lors {command} {stem}")
    close = nearest(stem.lower(), shipped)
    hint = f"Did you mean {close}? {listing}" if close else listing
    raise UsageError(f"There is no {what} {shorten(name)!r}: neither a file nor a shipped {what}.", hint)


def _shipped(folder: str) -> dict[str, Path]:
    """YAML files by name, from the installed package or else from the checkout around it."""
    package = Path(__file__).resolve().parents[1]
    roots = [package / "_shipped" / folder]
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / folder)
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted((*root.rglob("*.yaml"), *root.rglob("*.yml"))):
            found.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))
