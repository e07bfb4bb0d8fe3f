"""The recipes and configs that come with lors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from lors_cli.data.sources import SOURCES
from lors_cli.errors import UsageError
from lors_cli.evaluation.tasks import check_tasks
from lors_cli.recipe import shipped as shipped_module
from lors_cli.recipe.loading import Stage, load_recipe, load_stage
from lors_cli.recipe.schema import EvalConfig
from lors_cli.recipe.shipped import find, find_shipped_recipe, recipe_summary, shipped_files
from lors_cli.sweep.cells import load_sweep

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.y*ml"))
SWEEPS = sorted((ROOT / "recipes" / "sweeps").rglob("*.y*ml"))
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_files_are_shipped() -> None:
    assert sorted(shipped_files("recipe").values()) == RECIPES
    assert sorted(shipped_files("sweep").values()) == SWEEPS
    assert not shipped_files("sweep").keys() & shipped_files("recipe").keys()
    assert sorted(shipped_files("config").values()) == CONFIGS
    assert "quickstart" in shipped_files("recipe")


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
        check_tasks(recipe.eval, None)
        assert set(recipe.eval.perplexity) <= set(SOURCES)


@pytest.mark.parametrize("path", SWEEPS, ids=short)
def test_sweeps_are_valid(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    assert len(recipe_summary(path)) > 20
    assert len(sweep.cells) > 1
    for cell in sweep.cells:
        assert cell.base in shipped_files("recipe")
        assert cell.recipe.eval is not None
        check_tasks(cell.recipe.eval, None)


def test_the_sweeps_cells_are_the_papers_rows(shared_dir: Path) -> None:
    models = {
        "meta-llama/Llama-2-7b-hf": "Llama-2-7B", "meta-llama/Llama-2-13b-hf": "Llama-2-13B",
        "meta-llama/Meta-Llama-3-8B": "Llama-3-8B",
    }  # fmt: skip
    rows = json.loads((shared_dir / "reference" / "paper_tables.json").read_text())["rows"]
    for table in range(1, 5):
        expected = [
            (row["model"], row["prune"], row["pattern"], row["tune"], row["data"])
            for row in rows
            if row["table"] == table and row["tune"]
        ]
        found = []
        for cell in load_sweep(shipped_files("sweep")[f"table{table}"]).cells:
            prune, tune = cell.recipe.prune, cell.recipe.tune
            assert prune is not None
            assert tune is not None
            assert prune.sparsity in (None, 0.5)
            assert (tune.rank, tune.alpha, tune.start) == (16, 16, "gradient" if tune.method == "lors" else "kaiming")
            assert tune.method != "lors" or tune.learning_rate == 2e-5
            found.append((models[cell.recipe.model.path], prune.method, prune.pattern, tune.method, tune.data.dataset))
        assert sorted(found) == sorted(expected)


def test_slimpajama_is_half_a_billion_tokens() -> None:
    tune = load_recipe(shipped_files("recipe")["llama3-8b-2of4-slimpajama"]).tune
    assert tune is not None
    assert tune.max_tokens == 500_000_000
    assert tune.batch_size * tune.data.max_length == 256 * 1024


@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_configs_are_valid(path: Path) -> None:
    config: Any = load_stage(cast(Stage, path.relative_to(ROOT).parts[1]), path, [])
    if isinstance(config, EvalConfig):
        check_tasks(config, None)
    assert len(recipe_summary(path)) > 10


def test_the_quickstart_needs_no_hub() -> None:
    recipe = load_recipe(shipped_files("recipe")["quickstart"])
    assert recipe.model.path.startswith("package://")
    assert recipe.data_dir is None
    assert recipe.prune is not None
    assert recipe.tune is not None
    assert recipe.eval is not None
    assert recipe.prune.calibration.dataset == recipe.tune.data.dataset == "pydoc"
    assert (recipe.eval.tasks, recipe.eval.perplexity) == (("pydoc_choice",), ("pydoc",))


# Names on a command line ----------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the package in it; the packaged files win over those beside it."""
    root = tmp_path / "checkout"
    for name in ("recipes/quickstart.yaml", "recipes/sweeps/rank.yaml", "configs/prune/wanda.yaml",
                 "lors_cli/_shipped/recipes/quickstart.yaml", "pyproject.toml"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    monkeypatch.setattr(shipped_module, "__file__", str(root / "lors_cli/recipe/shipped.py"))
    monkeypatch.chdir(tmp_path)
    return root.resolve()


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "./recipes/quickstart.yml"]
)
def test_find_shipped(shipped: Path, name: str) -> None:
    assert list(shipped_files("recipe")) == ["quickstart"]
    assert list(shipped_files("sweep")) == ["rank"]
    assert list(shipped_files("config")) == ["prune/wanda"]
    assert find("recipe", name) == shipped / "lors_cli/_shipped/recipes/quickstart.yaml"
    for sweep in ("rank", "sweeps/rank.yaml", "recipes/sweeps/rank"):
        assert find("sweep", sweep) == shipped / "recipes/sweeps/rank.yaml"
        assert find_shipped_recipe(sweep) == shipped / "recipes/sweeps/rank.yaml"
    assert find("config", "prune/wanda") == shipped / "configs/prune/wanda.yaml"


def test_an_installed_package_does_not_look_beside_itself(shipped: Path) -> None:
    (shipped / "pyproject.toml").unlink()
    assert list(shipped_files("recipe")) == ["quickstart"]


def test_an_existing_file_comes_first_but_a_folder_does_not(shipped: Path) -> None:
    Path("quickstart.yaml").touch()
    assert find("recipe", "quickstart.yaml") == Path("quickstart.yaml")
    Path("quickstart").mkdir()
    assert find("recipe", "quickstart").is_file()
    Path("run").mkdir()
    Path("run/recipe.yaml").touch()
    with pytest.raises(UsageError, match=r"run is a folder.*\n.*run/recipe.yaml"):
        find("recipe", "run")


def test_unknown_recipe(shipped: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find("recipe", "quikstart")
    assert "There is no recipe 'quikstart'" in caught.value.message
    assert caught.value.hint == "Did you mean quickstart? `lors recipes` lists the shipped ones."
    with pytest.raises(UsageError, match="Shipped: prune/wanda"):
        find("config", "")


def test_a_sweep_is_no_recipe_and_the_reverse(shipped: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find("recipe", "rank")
    assert (caught.value.message, caught.value.hint) == ("rank is no recipe.", "For it there is: lors sweep rank")
    with pytest.raises(UsageError) as caught:
        find("sweep", "quickstart.yaml")
    assert caught.value.hint == "For it there is: lors run quickstart"
    with pytest.raises(UsageError, match="There is no sweep 'rnak'") as caught:
        find("sweep", "rnak")
    assert "Did you mean rank?" in str(caught.value.hint)
