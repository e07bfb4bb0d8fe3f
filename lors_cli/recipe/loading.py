"""YAML and key=value overrides to a `Recipe` or a stage's config, with every problem at its file and line.

Settings come from a file, then from overrides, then from command-line flags; later ones win. All are checked
together, and all problems are reported in one UsageError, one line each.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from lors_cli.errors import UsageError, shorten
from lors_cli.files.hashes import plain
from lors_cli.recipe.checking import check, field_names, subsection, unknown_key
from lors_cli.recipe.schema import STAGE_CONFIGS, STAGES, EvalConfig, ModelConfig, PruneConfig, Recipe, TuneConfig
from lors_cli.recipe.settings import Place, Settings, flag_name
from lors_cli.recipe.yaml12 import MAX_BYTES, YamlError, read, write

Stage = Literal["prune", "tune", "pack", "eval"]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """A whole recipe from a YAML file and overrides such as `tune.rank=32`; see `resolve_recipe`.

    Raises:
        UsageError: the file cannot be read, or with everything that is wrong in file and overrides.
    """
    settings = read_settings(Path(path))
    if "recipe" in settings.data and "model" not in settings.data:
        raise UsageError(f"{path} is a sweep, not a recipe.", f"For it there is: lors sweep {path}")
    return resolve_recipe(settings, overrides)


def resolve_recipe(settings: Settings, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with its seed handed to the stages that set none and all defaults filled in (in place)."""
    apply_overrides(Recipe, settings, overrides)
    _refuse_empty_stages(settings)
    _hand_down_seed(settings)
    recipe: Recipe = check(Recipe, settings)
    return recipe.with_defaults()


def load_stage(
    stage: Stage, path: Path | None, overrides: Sequence[str], flags: Mapping[str, Any] | None = None
) -> PruneConfig | TuneConfig | EvalConfig:
    """The config of a single stage from a file, overrides such as `rank=32`, and flags (None: not given) by dotted key.

    Raises:
        UsageError: the file cannot be read, or with everything that is wrong.
    """
    schema = STAGE_CONFIGS[stage]
    settings = read_settings(path) if path else Settings({}, {(): Place(f"{stage} settings", (0, 0))})
    apply_overrides(schema, settings, overrides)
    _apply_flags(settings, flags or {})
    config: PruneConfig | TuneConfig | EvalConfig = check(schema, settings)
    return config


def stage_config(stage: str, values: dict[str, Any]) -> PruneConfig | TuneConfig | EvalConfig:
    """The config of a stage from the plain values that its record has.

    Raises:
        UsageError: this version knows no such settings.
    """
    config: PruneConfig | TuneConfig | EvalConfig = check(
        STAGE_CONFIGS[stage], Settings(without_none(values), {(): Place(f"{stage}/stage.json", (0, 0))})
    )
    return config


def load_model_config(path: str, **flags: str) -> ModelConfig:
    """The model named on a command line by MODEL and its flags, such as `--dtype`."""
    settings = Settings({}, {(): Place("MODEL", (0, 0))})
    _apply_flags(settings, {"path": path, **flags})
    config: ModelConfig = check(ModelConfig, settings)
    return config


def _apply_flags(settings: Settings, flags: Mapping[str, Any]) -> None:
    for index, (key, value) in enumerate(flags.items()):
        if value is not None:
            keys = tuple(key.split("."))
            flag = "MODEL" if key == "path" else f"--{flag_name(key).replace('_', '-')}"
            settings.set(keys, plain(value), Place(flag, (2, index), keys), {})


def dump_recipe(recipe: Recipe | PruneConfig | TuneConfig | EvalConfig) -> str:
    """YAML text from which `load_recipe` (or `load_stage`) makes an equal recipe (or config)."""
    return write(recipe_values(recipe))


def recipe_values(recipe: Recipe | PruneConfig | TuneConfig | EvalConfig) -> dict[str, Any]:
    """A recipe's (or config's) settings as plain values, those that are None left out."""
    values: dict[str, Any] = without_none(plain(recipe))
    return values


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors, with a description of every key."""
    schema = json.loads(json.dumps(TypeAdapter(Recipe).json_schema()), object_hook=_on_one_line)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lors recipe"}


def read_settings(path: Path) -> Settings:
    """A YAML file's settings with their lines.

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
    if document.data is None and not document.raws.get(()):
        raise UsageError(f"{path}:1: the file is empty; it must hold settings such as `key: value`")
    if not isinstance(document.data, dict):
        line = document.lines[()]
        raise UsageError(f"{path}:{line}: the file must hold settings such as `key: value` at its top level")
    places = {key: Place(f"{path}:{line}", (0, line)) for key, line in document.lines.items()}
    settings = Settings(document.data, places, document.raws)
    settings.problems += [(Place(f"{path}:{line}", (0, line)), text) for line, text in document.problems]
    return settings


def apply_overrides(schema: type, settings: Settings, overrides: Sequence[str]) -> None:
    """Put key=value texts into the settings of `schema`; what is wrong with them is noted there."""
    for index, override in enumerate(overrides):
        key, equals, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        place = Place(f"override {shorten(override)}", (1, index), keys)
        problem = unknown_setting(schema, keys) if equals and all(keys) else "must be key=value"
        if problem:
            settings.add(keys, problem, place)
            continue
        try:
            document = read(text)
        except YamlError as error:
            settings.add(keys, error.message, place)
            continue
        if document.comments and (document.data is None or () in document.raws):
            whole = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
            settings.add(keys, f"{shorten(document.comments)} is a comment; leave it out, or quote all: {whole}", place)
            continue
        for _, problem in document.problems:
            settings.add(keys, problem, place)
        settings.set(keys, document.data, place, document.raws)


def unknown_setting(schema: type, keys: tuple[str, ...]) -> str | None:
    """What is wrong with a key path, or None when the schema has it."""
    for depth, key in enumerate(keys):
        if key not in field_names(schema):
            inner_keys = keys[depth + 1 :]
            if inner_keys and unknown_setting(schema, inner_keys) is None:  # a recipe's prefix in a stage's settings
                return f"unknown key; did you mean {'.'.join((*keys[:depth], *inner_keys))}?"
            return unknown_key(schema, key, keys[:depth], "".join(f"{part}." for part in keys[:depth]))
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


STAGE_SEEDS = (("tune", "seed"), ("prune", "calibration", "seed"))
"""Settings that the recipe's seed goes to."""


def _hand_down_seed(settings: Settings) -> None:
    """Give the recipe's seed to the stages that set none, or in what it comes after, such as the file an override's."""
    seed = settings.data.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        return
    prune, tune = settings.data.get("prune"), settings.data.get("tune")
    calibration = prune.setdefault("calibration", {}) if isinstance(prune, dict) else None
    layer = settings.place(("seed",)).order[0]
    for path, section in zip(STAGE_SEEDS, (tune, calibration), strict=True):
        if isinstance(section, dict) and ("seed" not in section or settings.place(path).order[0] < layer):
            section["seed"] = seed


def without_none(value: Any) -> Any:
    """Plain values without those that are None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _on_one_line(entry: dict[str, Any]) -> dict[str, Any]:
    if isinstance(entry.get("description"), str):
        entry["description"] = " ".join(entry["description"].split())
    return entry
