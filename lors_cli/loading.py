"""YAML and key=value overrides to a `Recipe` or a stage's config, with every problem at its file and line.

Settings come from a file, then from overrides, then from command-line flags; later ones win. All are checked
together, and all problems are reported in one UsageError, one line each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from lors_cli._checks import KeyPath, Place, Settings, check, field_names, subsection, unknown_key
from lors_cli._yaml import MAX_BYTES, YamlError, read, shorten, write
from lors_cli.errors import UsageError
from lors_cli.recipe import STAGE_CONFIGS, STAGES, EvalConfig, ModelConfig, PruneConfig, Recipe, TuneConfig
from lors_cli.run_dir import plain

Stage = Literal["prune", "tune", "eval"]

_FLAG_NAMES = {"calibration.dataset": "--calibration"}
_SEEDED: tuple[KeyPath, ...] = (("prune", "calibration", "seed"), ("tune", "seed"))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a whole recipe.

    Args:
        path: a YAML file.
        overrides: `tune.rank=32` and the like; values are YAML.

    Returns:
        The recipe, with its seed handed to the stages that set none and all defaults filled in.

    Raises:
        UsageError: the file cannot be read, or with everything that is wrong in file and overrides.
    """
    settings = _read_file(path)
    _apply_overrides(Recipe, settings, overrides)
    _refuse_empty_stages(settings)
    _hand_down_seed(settings)
    recipe: Recipe = check(Recipe, settings)
    return recipe.with_defaults()


def load_stage(
    stage: Stage,
    path: Path | None,
    overrides: Sequence[str],
    flags: dict[str, Any] | MappingProxyType[str, Any] = MappingProxyType({}),
) -> PruneConfig | TuneConfig | EvalConfig:
    """Read the config of a single stage; keys are relative to the stage.

    Args:
        stage: which.
        path: a YAML file, or None for the defaults.
        overrides: `rank=32` and the like.
        flags: values of command-line flags by dotted key; None means that the flag was not given.

    Returns:
        The stage's config.

    Raises:
        UsageError: the file cannot be read, or with everything that is wrong.
    """
    schema = STAGE_CONFIGS[stage]
    settings = _read_file(path) if path else Settings({}, {(): Place(f"{stage} settings", (0, 0))})
    _apply_overrides(schema, settings, overrides)
    for index, (key, value) in enumerate(flags.items()):
        if value is None:
            continue
        keys = tuple(key.split("."))
        flag = _FLAG_NAMES.get(key, "--" + str(keys[-1]).replace("_", "-"))
        settings.set(keys, plain(value), Place(flag, (2, index), keys), {})
    config: PruneConfig | TuneConfig | EvalConfig = check(schema, settings)
    return config


def load_model_config(path: str, *, dtype: str = "auto", device: str = "auto") -> ModelConfig:
    """The model named on a command line.

    Args:
        path: the MODEL argument.
        dtype: of `--dtype`.
        device: of `--device`.

    Raises:
        UsageError: a value is none that the schema allows.
    """
    settings = Settings({}, {(): Place("MODEL", (0, 0))})
    for index, (key, place, value) in enumerate(
        (("path", "MODEL", path), ("dtype", "--dtype", dtype), ("device", "--device", device))
    ):
        settings.set((key,), value, Place(place, (2, index), (key,)), {})
    config: ModelConfig = check(ModelConfig, settings)
    return config


def dump_recipe(recipe: Recipe | PruneConfig | TuneConfig | EvalConfig) -> str:
    """YAML text from which `load_recipe` (or `load_stage`) makes an equal recipe (or config).

    Args:
        recipe: any, with or without defaults filled in.

    Returns:
        The text; settings that are None are left out.
    """
    return write(_without_none(plain(recipe)))


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors.

    Returns:
        The schema, with a description of every key.
    """
    from pydantic import TypeAdapter

    schema = _joined_lines(TypeAdapter(Recipe).json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lors recipe"}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with lors, by name: the path below `recipes/` without its ending."""
    return _shipped("recipes")


def shipped_configs() -> dict[str, Path]:
    """The single-stage configs that come with lors, by name, such as `prune/wanda`."""
    return _shipped("configs")


def find_recipe(name: str) -> Path:
    """The recipe file meant by a command's RECIPE.

    Args:
        name: a path, or a shipped recipe's name (`quickstart`, `quickstart.yaml`, `recipes/quickstart.yaml`).

    Returns:
        An existing file.

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    return _find(name, "recipes", "recipe", "`lors recipes` lists the shipped ones.")


def find_shipped_recipe(name: str) -> Path:
    """A shipped recipe's file, whatever lies in the current folder.

    Raises:
        UsageError: there is none, with the nearest shipped name.
    """
    shipped = shipped_recipes()
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix("recipes/"))
    if stem in shipped:
        return shipped[stem]
    close = difflib.get_close_matches(stem[:100].lower(), list(shipped), n=1)
    hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(shipped)}."
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
    return _find(name, "configs", "config", f"Shipped: {', '.join(shipped_configs()) or 'none'}.")


def _find(name: str, folder: str, what: str, listing: str) -> Path:
    path = Path(name).expanduser()
    if name and path.exists() and not path.is_dir():
        return path
    shipped = _shipped(folder)
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix("./").removeprefix(f"{folder}/"))
    if stem in shipped:
        return shipped[stem]
    if name and path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"The run folder's recipe is {inside}." if inside.is_file() else f"Give a YAML file. {listing}"
        raise UsageError(f"{name} is a folder, not a {what} file.", hint)
    close = difflib.get_close_matches(stem[:100].lower(), list(shipped), n=1)
    hint = f"Did you mean {close[0]}? {listing}" if close else listing
    raise UsageError(f"There is no {what} {shorten(name)!r}: neither a file nor a shipped {what}.", hint)


def _shipped(folder: str) -> dict[str, Path]:
    """YAML files by name, from the installed package or else from the checkout around it."""
    package = Path(__file__).resolve().parent
    roots = [package / "_shipped" / folder]
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / folder)
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted((*root.rglob("*.yaml"), *root.rglob("*.yml"))):
            found.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def _read_file(path: Path) -> Settings:
    """The file's settings with their lines.

    Raises:
        UsageError: it cannot be read, is too large, is no UTF-8 YAML or no mapping.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}:1: larger than {MAX_BYTES // 1_000_000} MB, which no recipe is")
    try:
        document = read(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None
    except YamlError as error:
        raise UsageError(f"{path}:{error.line}: {error.message}") from None
    if document.is_empty:
        raise UsageError(f"{path}:1: the file is empty; it must hold settings such as `key: value`")
    if not isinstance(document.data, dict):
        line = document.lines[()]
        raise UsageError(f"{path}:{line}: the file must hold settings such as `key: value` at its top level")
    places = {key: Place(f"{path}:{line}", (0, line)) for key, line in document.lines.items()}
    settings = Settings(document.data, places, document.raws)
    settings.problems += [(Place(f"{path}:{line}", (0, line)), text) for line, text in document.problems]
    return settings


def _apply_overrides(schema: type, settings: Settings, overrides: Sequence[str]) -> None:
    for index, override in enumerate(overrides):
        key, equals, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        place = Place(f"override {shorten(override)}", (1, index), keys)
        if not equals or not all(keys):
            settings.add(keys, "must be key=value", place)
            continue
        unknown = _unknown(schema, keys)
        if unknown:
            settings.add(keys, unknown, place)
            continue
        try:
            document = read(text)
        except YamlError as error:
            settings.add(keys, error.message, place)
            continue
        for _, problem in document.problems:
            settings.add(keys, problem, place)
        settings.set(keys, document.data, place, document.raws)


def _unknown(schema: type, keys: tuple[str, ...]) -> str | None:
    """What is wrong with the key path, or None when the schema has it."""
    for depth, key in enumerate(keys):
        if key not in field_names(schema):
            prefix = f"{'.'.join(keys[:depth])}." if depth else ""
            message = unknown_key(schema, key, keys[:depth])
            close = re.search(r"did you mean (\w+)\?", message)
            return message.replace(close.group(1) + "?", f"{prefix}{close.group(1)}?") if close else message
        inner = subsection(schema, key)
        if inner is None and depth + 1 < len(keys):
            return f"{'.'.join(keys[: depth + 1])} is a single value and has no keys of its own"
        schema = inner or schema
    return None


def _refuse_empty_stages(settings: Settings) -> None:
    """`tune:` with nothing below it could mean “no tuning” or “the defaults”, so it must be said."""
    for stage in STAGES:
        if stage in settings.data and settings.raws.get((stage,)) == "":
            settings.add((stage,), f"is empty; write `{stage}: {{}}` for the defaults, or remove the stage")
            settings.data[stage] = {}


def _hand_down_seed(settings: Settings) -> None:
    """Give the recipe's seed to the stages that set none."""
    seed = settings.data.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        return
    for path in _SEEDED:
        section: Any = settings.data.get(str(path[0]))
        for key in path[1:-1]:
            section = section.setdefault(str(key), {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault(str(path[-1]), seed)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _joined_lines(value: Any) -> Any:
    """The schema with each description on one line."""
    if isinstance(value, dict):
        joined = {key: _joined_lines(item) for key, item in value.items()}
        if isinstance(joined.get("description"), str):
            joined["description"] = " ".join(joined["description"].split())
        return joined
    return [_joined_lines(item) for item in value] if isinstance(value, list) else value
