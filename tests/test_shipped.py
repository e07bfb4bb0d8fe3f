"""The recipes and configs that come with lors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from lors_cli.evaluation import check_tasks
from lors_cli.loading import Stage, load_recipe, load_stage, recipe_summary, shipped_configs, shipped_recipes
from lors_cli.recipe import EvalConfig
from lors_cli.text import SOURCES

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_files_are_shipped() -> None:
    assert sorted(shipped_recipes().values()) == RECIPES
    assert sorted(shipped_configs().values()) == CONFIGS
    assert "quickstart" in shipped_recipes()


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert len(recipe_summary(path)) > 20
    if recipe.prune:
        assert recipe.prune.calibration.dataset in SOURCES
    if recipe.tune:
        assert recipe.tune.data.dataset in SOURCES
    if recipe.eval:
        check_tasks(recipe.eval.tasks, None)
        assert set(recipe.eval.perplexity) <= set(SOURCES)


@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_configs_are_valid(path: Path) -> None:
    config: Any = load_stage(cast(Stage, path.relative_to(ROOT).parts[1]), path, [])
    if isinstance(config, EvalConfig):
        check_tasks(config.tasks, None)
    assert len(recipe_summary(path)) > 10


def test_the_quickstart_needs_no_hub() -> None:
    recipe = load_recipe(shipped_recipes()["quickstart"])
    assert recipe.model.path.startswith("package://")
    assert recipe.data_dir is None
    assert recipe.prune is not None
    assert recipe.tune is not None
    assert recipe.eval is not None
    assert recipe.prune.calibration.dataset == recipe.tune.data.dataset == "pydoc"
    assert (recipe.eval.tasks, recipe.eval.perplexity) == (("pydoc_choice",), ("pydoc",))
