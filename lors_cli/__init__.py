"""Prune, tune and evaluate sparse language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lors_cli.machine.imports import when_imported as _when_imported

if TYPE_CHECKING:
    from lors_cli.errors import LorsError as LorsError
    from lors_cli.errors import MissingError as MissingError
    from lors_cli.errors import ResourceError as ResourceError
    from lors_cli.errors import SparsityError as SparsityError
    from lors_cli.errors import UsageError as UsageError
    from lors_cli.evaluation.stage import evaluate as evaluate
    from lors_cli.files.records import StageRecord as StageRecord
    from lors_cli.models.generation import Generated as Generated
    from lors_cli.output.progress import Task as Task
    from lors_cli.output.progress import on_progress as on_progress
    from lors_cli.pruning.stage import prune as prune
    from lors_cli.recipe.loading import load_recipe as load_recipe
    from lors_cli.recipe.schema import CalibrationConfig as CalibrationConfig
    from lors_cli.recipe.schema import ColumnsConfig as ColumnsConfig
    from lors_cli.recipe.schema import DistillConfig as DistillConfig
    from lors_cli.recipe.schema import EvalConfig as EvalConfig
    from lors_cli.recipe.schema import ModelConfig as ModelConfig
    from lors_cli.recipe.schema import PruneConfig as PruneConfig
    from lors_cli.recipe.schema import QuantizeConfig as QuantizeConfig
    from lors_cli.recipe.schema import Recipe as Recipe
    from lors_cli.recipe.schema import TuneConfig as TuneConfig
    from lors_cli.recipe.schema import TuneDataConfig as TuneDataConfig
    from lors_cli.tuning.loading import generate as generate
    from lors_cli.tuning.loading import load as load
    from lors_cli.tuning.stage import tune as tune

__version__ = "0.1.0"
_PLACES = {
    "pruning.stage": ("prune",),
    "tuning.stage": ("tune",),
    "evaluation.stage": ("evaluate",),
    "tuning.loading": ("load", "generate"),
    "output.progress": ("on_progress", "Task"),
    "recipe.schema": ("PruneConfig", "QuantizeConfig", "CalibrationConfig", "TuneConfig", "TuneDataConfig",
                      "DistillConfig", "EvalConfig", "ModelConfig", "ColumnsConfig", "Recipe"),
    "recipe.loading": ("load_recipe",),
    "files.records": ("StageRecord",),
    "models.generation": ("Generated",),
    "errors": ("LorsError", "UsageError", "MissingError", "ResourceError", "SparsityError"),
}  # fmt: skip
"""Where the public names are; a module is imported when a name of it is asked for, torch and all."""

__all__ = ["__version__", *(name for names in _PLACES.values() for name in names)]


_when_imported("transformers.quantizers", lambda: import_module("lors_cli.models.packed.quantizer"))


def __getattr__(name: str) -> Any:
    """A public name, once it is asked for."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"lors_cli.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
