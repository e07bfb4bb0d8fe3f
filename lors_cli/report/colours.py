"""A colour for every model, the same in all figures of a report: a family's hue, within it a shade a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lors_cli.report.drawing import METHOD_COLOURS, PALETTE, Look
from lors_cli.report.measures import Group, ScoredModel
from lors_cli.report.paper import METHODS

_NAMED = ("#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7A5230", "#0072B2", "#E69F00")
"""Of models with names of their own, in their order."""
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))


def coloured(groups: Sequence[Group]) -> list[Group]:
    """The same groups, each model with its look."""
    models = [model for group in groups for model in group.models]
    methods = {str(model.tune.get("method")) for model in models if model.role == "tuned"}
    families = [_family(model, apart=len(methods) > 1) for model in models]
    hues = _hues(models, families)
    looks, seen = [], dict.fromkeys(families, 0)
    for family in families:
        place, size = seen[family], families.count(family)
        looks.append(Look(_shade(hues[family], place, size), _DASHES[place % len(_DASHES)], family, hues[family]))
        seen[family] += 1
    following = iter(looks)
    return [
        Group(group.title, tuple(replace(model, look=next(following)) for model in group.models)) for group in groups
    ]


def _family(model: ScoredModel, *, apart: bool) -> str:
    """What a model's hue stands for; tuned ones by method where there are several."""
    if model.role == "tuned" and apart:
        method = str(model.tune.get("method"))
        return METHODS.get(method, method)
    return model.role or model.label


def _hues(models: Sequence[ScoredModel], families: Sequence[str]) -> dict[str, str]:
    hues: dict[str, str] = {}
    for model, family in zip(models, families, strict=True):
        known = PALETTE.get(family) or METHOD_COLOURS.get(str(model.tune.get("method")) if model.role else "")
        if known:
            hues[family] = known
    free = [colour for colour in _NAMED if colour not in hues.values()] or list(_NAMED)
    others = [family for family in dict.fromkeys(families) if family not in hues]
    return hues | {family: free[place % len(free)] for place, family in enumerate(others)}


def _shade(colour: str, place: int, size: int) -> str:
    """The first of a family has its hue, the last is a good half of the way to white."""
    share = 0.55 * place / max(size - 1, 1)
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)
