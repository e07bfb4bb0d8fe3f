"""docs/recipe.md is what the schema says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import Result

from lors_cli.recipe.loading import load_recipe, recipe_schema
from lors_cli.recipe.reference import KINDS, SECTIONS, markdown, settings
from lors_cli.recipe.rules import RULES
from lors_cli.recipe.schema import Recipe, TuneConfig

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
COMMAND = "lors recipes reference > docs/recipe.md"


def test_the_page_is_what_the_schema_makes(lors: Callable[..., Result]) -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), f"docs/recipe.md is out of date; run: {COMMAND}"
    assert COMMAND in markdown()
    assert lors("recipes", "reference").stdout == markdown()


def test_every_setting_is_there_and_described() -> None:
    found = {setting.key: setting for setting in settings()}
    assert len(found) == sum(len(fields(kind)) for kind in SECTIONS.values())
    assert all(setting.description for setting in found.values())
    assert {setting.key for setting in found.values() if setting.required} == {
        "name", "model", "model.path", "tune.data.mix.dataset", "tune.data.mix.weight",
    }  # fmt: skip


def test_a_setting_says_what_it_may_be() -> None:
    found = {setting.key: setting for setting in settings()}
    assert found["prune.sparsity"].kind == "number above 0, below 1"
    assert found["tune.init"].kind == "`gradient`, `gradient-exact`, `kaiming`"
    assert found["eval.models"].kind == "list of `dense`, `pruned`, `tuned`"
    assert found["tune.max_steps"].kind == "whole number above 0"
    assert found["seed"].kind == "whole number at least 0, below 2³²"
    assert found["tune.rank"].default == "16"
    assert found["tune.use_rslora"].default == "true"
    assert found["tune.max_steps"].default is None


def test_defaults_read_as_yaml_give_the_schemas(tmp_path: Path) -> None:
    lines = [f"{setting.key.removeprefix('tune.')}: {setting.default}" for setting in settings()
             if setting.key.startswith("tune.") and setting.key.count(".") == 1 and setting.default]  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nmodel: {path: y}\ntune:\n" + "".join(f"  {line}\n" for line in lines))
    assert load_recipe(recipe).tune == TuneConfig()


@pytest.mark.parametrize("section", RULES)
def test_a_line_for_every_rule(section: str) -> None:
    lines, messages = {rule for *_, rule in RULES[section]}, {message for _, _, message, _ in RULES[section]}
    assert len(lines) == len(messages), f"RULES[{section!r}] in rules.py needs a line for each message"
    assert {f"- {line}" for line in lines} <= set(markdown().splitlines())


def test_sections_with_rules_and_patterns_are_all_known() -> None:
    assert set(RULES) <= {section.__name__ for section in SECTIONS.values()}
    text = json.dumps(recipe_schema())
    assert text.count('"pattern":') - text.count('"pattern": {') == len(KINDS)
    assert SECTIONS[""] is Recipe


def test_json(lors: Callable[..., Result]) -> None:
    found = json.loads(lors("recipes", "reference", "--json").stdout)
    assert {"key": "tune.rank", "kind": "whole number above 0", "default": "16", "required": False}.items() <= next(
        setting for setting in found if setting["key"] == "tune.rank"
    ).items()
