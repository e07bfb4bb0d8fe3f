"""The schema of recipes, loading and checking them. The settings' classes are here by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lors_cli.recipe.schema import CalibrationConfig as CalibrationConfig
    from lors_cli.recipe.schema import DistillConfig as DistillConfig
    from lors_cli.recipe.schema import EvalConfig as EvalConfig
    from lors_cli.recipe.schema import ModelConfig as ModelConfig
    from lors_cli.recipe.schema import PruneConfig as PruneConfig
    from lors_cli.recipe.schema import QuantizeConfig as QuantizeConfig
    from lors_cli.recipe.schema import Recipe as Recipe
    from lors_cli.recipe.schema import TuneConfig as TuneConfig
    from lors_cli.recipe.schema import TuneDataConfig as TuneDataConfig


def __getattr__(name: str) -> Any:
    """A class of the schema, once it is asked for: pydantic takes time to load."""
    return getattr(import_module("lors_cli.recipe.schema"), name)
