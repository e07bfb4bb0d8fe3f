"""A stored recipe says every setting: a new one must be filled in, or be named here with why it is absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from lors_cli.recipe.checking import subsection
from lors_cli.recipe.loading import dump_recipe, load_recipe, recipe_values
from lors_cli.recipe.resolved import resolved_recipe
from lors_cli.recipe.schema import (
    DistillConfig,
    EvalConfig,
    ModelConfig,
    PruneConfig,
    QuantizeConfig,
    Recipe,
    TeacherCacheConfig,
    TuneConfig,
    TuneDataConfig,
)

OFF = {
    "tune.data.num_samples", "tune.max_steps", "tune.max_tokens", "tune.spike_factor", "eval.limit",
    "tune.val_size", "tune.eval_steps", "tune.early_stopping_patience", "tune.load_best_model_at_end",
    "eval.perplexity_windows", "eval.system_instruction", "eval.include_path", "data_dir",
    *(f"{section}.columns.{name}" for section in ("prune.calibration", "tune.data")
      for name in ("text", "messages", "instruction", "input", "output", "system", "history")),
}  # fmt: skip
"""Limits and places: not given means that there is none."""
FROM_THE_INPUTS = {
    "prune.calibration.num_samples": "128, or all rows of a token file: stage.json's metrics.calibration",
    "prune.calibration.sequence_length": "the model's limit decides: stage.json's metrics.calibration",
    "eval.perplexity_length": "the model's limit decides: beside each perplexity in eval/*.json",
    "model.add_bos_token": "the tokenizer decides",
    "eval.num_fewshot": "the tasks' definitions decide: beside each task in eval/*.json",
    "eval.fewshot_as_multiturn": "apply_chat_template, as in lm-eval",
    "tune.data.packing": "the kind of text decides: in the recipe once the stage is done",
    "tune.per_device_batch_size": "batch_size and the number of processes decide",
}


def leaves(schema: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(schema):
        section = subsection(schema, field.name)
        yield from leaves(section, f"{prefix}{field.name}.") if section else [f"{prefix}{field.name}"]


def has(values: object, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def recipe(**changes: object) -> Recipe:
    tune = TuneConfig(distill=DistillConfig(teacher="teacher", cache=TeacherCacheConfig()))
    parts = {"prune": PruneConfig(quantize=QuantizeConfig()), "tune": tune, "eval": EvalConfig(), **changes}
    return Recipe(name="all", model=ModelConfig(path="model"), **parts)  # type: ignore[arg-type]


def test_every_setting_of_the_schema_is_said() -> None:
    values = recipe_values(resolved_recipe(recipe()))
    absent = {path for path in leaves(Recipe) if not has(values, path)}
    assert absent == OFF | FROM_THE_INPUTS.keys()


@pytest.mark.parametrize(
    ("prune", "tune", "expected"),
    [
        (PruneConfig(), TuneConfig(), (0.5, False, "gradient", "stochastic", 1e-3)),
        (
            PruneConfig(method="admm", pattern="4:16"),
            TuneConfig(method="spp"),
            (0.75, True, "kaiming", "nearest", 3e-2),
        ),
        (
            PruneConfig(method="magnitude", pattern="unstructured", sparsity=0.6),
            TuneConfig(init="kaiming", rounding="nearest"),
            (0.6, False, "kaiming", "nearest", 3e-3),
        ),
    ],
)
def test_what_follows_from_the_method_is_said(
    prune: PruneConfig, tune: TuneConfig, expected: tuple[object, ...]
) -> None:
    found = resolved_recipe(recipe(prune=prune, tune=tune))
    assert found.prune is not None
    assert found.tune is not None
    prune, tune = found.prune, found.tune
    assert (prune.sparsity, prune.true_sequential, tune.init, tune.rounding, tune.learning_rate) == expected
    assert resolved_recipe(found) == found


def test_a_resolved_recipe_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for method in ("lors", "sqft", "spp", "hira", "lora"):
        for pruner in ("magnitude", "wanda", "admm"):
            data = TuneDataConfig(packing="separate")
            made = recipe(prune=PruneConfig(method=pruner), tune=TuneConfig(method=method, data=data))  # type: ignore[arg-type]
            found = resolved_recipe(made)
            path.write_text(dump_recipe(found))
            assert load_recipe(path) == found
