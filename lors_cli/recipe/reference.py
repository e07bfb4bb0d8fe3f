"""`lors recipes reference`: every setting of a recipe, from the schema, as Markdown or as plain values."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from lors_cli.recipe.loading import recipe_schema
from lors_cli.recipe.schema import (
    SEVEN_TASKS,
    CalibrationConfig,
    ColumnsConfig,
    DistillConfig,
    EvalConfig,
    ModelConfig,
    PruneConfig,
    Recipe,
    TuneConfig,
    TuneDataConfig,
)

SECTIONS: dict[str, Any] = {
    "": Recipe,
    "model": ModelConfig,
    "prune": PruneConfig,
    "prune.calibration": CalibrationConfig,
    "prune.calibration.columns": ColumnsConfig,
    "tune": TuneConfig,
    "tune.data": TuneDataConfig,
    "tune.data.columns": ColumnsConfig,
    "tune.distill": DistillConfig,
    "eval": EvalConfig,
}
RULES: dict[str, list[str]] = {
    "": [
        "At least one of `prune`, `tune` and `eval` is there. A stage without settings is `prune: {}`.",
        "`eval.models` names only models that the recipe makes.",
    ],
    "prune": [
        "`true_sequential` needs a method that looks at inputs: not `magnitude`, unless `refit` is on.",
        "`layer_sparsity: owl` needs `pattern: unstructured` and a method other than `magnitude`.",
        "`reconstruct_epochs` needs calibration samples: not `magnitude`, unless `refit` is on.",
        "`channel_permutation` needs a pattern N:M.",
        "`pattern: unstructured` needs `sparsity`.",
        "N:M needs 0 < N < M, and M divides the inputs of every pruned weight.",
        "`sparsity` beside N:M is 1 − N/M, or left out.",
    ],
    "tune.data.columns": [
        "`text`, or `messages` (and `system`), or `instruction` and `output` (and `input`, `system`, `history`).",
    ],
    "tune": [
        "`init` other than `kaiming` is for additive updates: not for `spp`, `spp-gc` and `hira`.",
        "`merged_cache: on` is for `lors`.",
        "`rounding: stochastic` is for `lors`.",
        "`base: compressed` is for `lors`, on a 2:4 model.",
        "`parallelism: fsdp` excludes `init: gradient-exact`, `base: compressed` and `merged_cache: on`.",
        "`train_norms` is not for `lora`.",
        "`norms_lr_ratio` is for `train_norms: true`.",
        "`max_tokens` excludes `max_steps`.",
        "`max_tokens` needs streamed text: not `data.stream: off`.",
        "`min_learning_rate` is at most `learning_rate`.",
        "`batch_size` is a multiple of `per_device_batch_size`.",
    ],
    "eval": [
        "Nothing is listed twice in `models`, `tasks` or `perplexity`.",
        "`tasks` or `perplexity` names something.",
    ],
}
"""The rules of `lors_cli.recipe.rules` in the words of the page, one for each message."""

KINDS = {
    "name": "letters, digits, `.`, `_`, `-`; at most 100",
    "model.device": "`auto`, `cpu`, `mps`, `cuda`, `cuda:N`",
    "prune.pattern": "`N:M`, `unstructured`",
}
"""In words, what the schema says by a regular expression."""

_HEAD = """\
# Settings of a recipe

<!-- Generated: lors recipes reference > docs/recipe.md -->

A recipe is a YAML file with a `name`, a `model` and one or more of the stages `prune`, `tune`, `eval`. On the command
line any setting is given as `key=value`, its value in YAML: `lors run mine.yaml tune.rank=32 eval.tasks=[boolq,rte]`. A
single stage's settings, on the command line and in the file of `--config`, are relative to the stage:
`lors tune sparse --out tuned rank=32 data.max_length=1024`.

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
    schema = recipe_schema()
    found = []
    for section, kind in SECTIONS.items():
        properties = (schema if kind is Recipe else schema["$defs"][kind.__name__])["properties"]
        hints = get_type_hints(kind, include_extras=True)
        for entry in fields(kind):
            key = f"{section}.{entry.name}" if section else entry.name
            description = properties[entry.name].get("description", "")
            words = KINDS.get(key) or _kind(hints[entry.name], properties[entry.name])
            found.append(Setting(key, words, _default(key, entry), _is_required(entry), description))
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
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    for setting in found:
        default = "required" if setting.required else "—" if setting.default is None else f"`{setting.default}`"
        name = setting.key.rpartition(".")[2]
        if setting.key in SECTIONS:
            name = f"[{name}](#{setting.key.replace('.', '')})"
            default = "required" if setting.required else "—"
        else:
            name = f"`{name}`"
        description = re.sub(r"\$[A-Z_]+", r"`\g<0>`", setting.description)  # no formula
        cells = (name, setting.kind, default, description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    if section in RULES:
        lines += ["", *(f"- {rule}" for rule in RULES[section])]
    return "\n".join([*lines, ""])


def _is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _default(key: str, entry: Field[Any]) -> str | None:
    """The default in YAML; None where there is none, or it is said in the description."""
    value = entry.default
    if key in SECTIONS or value is MISSING or value is None:
        return None
    if value == SEVEN_TASKS:
        return f"[{', '.join(SEVEN_TASKS)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(hint: Any, schema: dict[str, Any]) -> str:
    """What a setting may be, in words."""
    choices = [part for part in get_args(hint) if part is not type(None)]
    if type(None) in get_args(hint) and len(choices) == 1:
        shapes = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
        return _kind(choices[0], shapes[0])
    if hasattr(hint, "__metadata__"):
        return _kind(get_args(hint)[0], schema)
    if hint in SECTIONS.values():
        return "a section"
    if get_origin(hint) is tuple:
        return f"list of {_kind(choices[0], schema.get('items', {}))}"
    if "enum" in schema:
        return ", ".join(f"`{word}`" for word in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if hint is bool:
        return "`true`, `false`"
    return {int: "whole number", float: "number", str: "text"}[hint] + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    said = [
        f"{word} {'2³²' if schema[name] == 2**32 else format(schema[name], 'g')}"
        for name, word in words.items()
        if name in schema
    ]
    return f" {', '.join(said)}" if said else ""
