"""The rules between a recipe's keys, and what is derived from them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest

from lors_cli.recipe.schema import (
    DistillConfig,
    EvalConfig,
    ModelConfig,
    PackConfig,
    PruneConfig,
    QuantizeConfig,
    Recipe,
    TuneConfig,
)

MODEL = ModelConfig(path="m")


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("2:3", 1 / 3), ("4:8", None)])
def test_sparsity_may_repeat_the_pattern(pattern: str, sparsity: float | None) -> None:
    assert PruneConfig(pattern=pattern, sparsity=sparsity).sparsity == sparsity


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "unstructured"}, "needs a sparsity"),
        ({"pattern": "2:4", "sparsity": 0.6}, "contradicts pattern: 2:4, which is 0.5"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "0:0"}, "0 < N < M"),
    ],
)
def test_prune_rules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"learning_rate": 1e-5, "min_learning_rate": 1e-4},
            "min_learning_rate: 0.0001 is above learning_rate: 1e-05$",
        ),
        ({"min_learning_rate": 2e-3}, "0.002 is above learning_rate: 0.001, the default of method: lors"),
        ({"method": "spp", "min_learning_rate": 0.1}, "0.1 is above learning_rate: 0.03, the default of method: spp"),
        ({"lr_schedule": "constant", "min_learning_rate": 1e-5}, "the floor of a rate that falls"),
        ({"batch_size": 10, "per_device_batch_size": 4}, "not a multiple of per_device_batch_size: 4"),
        ({"warmup_steps": 5, "max_steps": 5}, "warmup_steps: the learning rate never reaches its peak: max_steps is 5"),
    ],
)
def test_tune_rules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig(**values)


def test_a_floor_below_the_implied_rate_is_taken() -> None:
    for method, init in (("lors", "kaiming"), ("sqft", None), ("lora", None), ("spp-gc", None), ("hira", None)):
        assert TuneConfig(method=method, init=init, min_learning_rate=2e-3).learning_rate is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prune", "tune", "message"),
    [
        ({}, {"method": "lora"}, "method: lora fills the zeros"),
        ({}, {"method": "lora", "skip": ("*.down_proj",)}, None),
        ({"pattern": "7:8"}, None, "pack: it needs 25% of zeros, and prune makes 0.125 of the weights zero"),
        ({"pattern": "unstructured", "sparsity": 0.2}, {}, "prune makes 0.2 of"),
        ({"pattern": "unstructured", "sparsity": 0.2, "layer_sparsity": "owl"}, None, None),
        ({"pattern": "7:8", "quantize": QuantizeConfig()}, None, None),
        ({"pattern": "7:8", "quantize": QuantizeConfig()}, {}, "prune makes 0.125"),
        ({"pattern": "7:8", "quantize": QuantizeConfig()}, {"quantization_aware": True}, None),
        ({"pattern": "3:4"}, None, None),
    ],
)
def test_a_recipe_whose_result_cannot_be_packed_is_refused(
    prune: dict[str, Any], tune: dict[str, Any] | None, message: str | None
) -> None:
    """It failed after hours, at its last stage."""
    stages = {"prune": PruneConfig(**prune), "tune": None if tune is None else TuneConfig(**tune)}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        Recipe(name="r", model=MODEL, pack=PackConfig(), **stages)  # type: ignore[arg-type]


def test_scale() -> None:
    assert math.isclose(TuneConfig(alpha=16, rank=16).scale, 4.0)
    assert math.isclose(TuneConfig(alpha=16, rank=64).scale, 2.0)
    assert math.isclose(TuneConfig(alpha=16, rank=64, use_rslora=False).scale, 0.25)


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (7, 1), (32, 4), (34, 2)])
def test_micro_batch_size_divides_the_batch(batch: int, micro: int) -> None:
    assert TuneConfig(batch_size=batch).micro_batch_size == micro
    assert batch % micro == 0


def test_micro_batch_size_as_given() -> None:
    assert TuneConfig(batch_size=32, per_device_batch_size=16).micro_batch_size == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("rte", "rte")}, "tasks: rte is listed twice"),
        ({"models": ("dense", "dense")}, "models: dense is listed twice"),
        ({"perplexity": ("c4", "c4")}, "perplexity: c4 is listed twice"),
        ({"tasks": ()}, "nothing to evaluate"),
    ],
)
def test_eval_rules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**values)


def test_perplexity_alone_is_enough() -> None:
    assert EvalConfig(tasks=(), perplexity=("pydoc",)).perplexity == ("pydoc",)


def test_recipe_needs_a_stage() -> None:
    with pytest.raises(ValueError, match="there is no stage"):
        Recipe(name="a", model=MODEL)


@pytest.mark.parametrize("sparsity", [0.05, 0.08, 0.92, 0.95])
def test_owl_leaves_every_block_some_weights_and_some_zeros(sparsity: float) -> None:
    owl = {"method": "wanda", "pattern": "unstructured", "layer_sparsity": "owl"}
    with pytest.raises(ValueError, match=r"sparsity: owl lets blocks have 0\.08 less and more than"):
        PruneConfig(sparsity=sparsity, **owl)  # type: ignore[arg-type]
    PruneConfig(sparsity=0.9, **owl)  # type: ignore[arg-type]


def test_reconstruction_is_not_for_float16() -> None:
    with pytest.raises(ValueError, match=r"prune\.reconstruct_epochs: gradients do not fit into float16"):
        Recipe(name="a", model=ModelConfig(path="m", dtype="float16"), prune=PruneConfig(reconstruct_epochs=1))


def test_eval_names_only_models_that_exist() -> None:
    with pytest.raises(ValueError, match="pruned is not made by this recipe, which has dense, tuned"):
        Recipe(name="a", model=MODEL, tune=TuneConfig(), eval=EvalConfig(models=("dense", "pruned")))


@pytest.mark.parametrize(
    ("stages", "roles"),
    [
        ({}, ("dense",)),
        ({"prune": PruneConfig()}, ("dense", "pruned")),
        ({"tune": TuneConfig()}, ("dense", "tuned")),
        ({"prune": PruneConfig(), "tune": TuneConfig()}, ("dense", "pruned", "tuned")),
    ],
)
def test_defaults_name_the_models_that_are_made(stages: dict[str, Any], roles: tuple[str, ...]) -> None:
    recipe = Recipe(name="a", model=MODEL, eval=EvalConfig(), **stages).with_defaults()
    assert recipe.roles() == roles
    assert recipe.eval is not None
    assert recipe.eval.models == roles
    assert recipe.with_defaults() == recipe


@pytest.mark.parametrize(("given", "taken"), [("main", "v1"), ("v2", "v2")])
def test_the_teacher_is_the_models_own_at_the_revision_that_is_given(given: str, taken: str) -> None:
    model, tune = ModelConfig(path="org/m", revision="v1"), TuneConfig(distill=DistillConfig(revision=given))
    recipe = Recipe(name="a", model=model, prune=PruneConfig(), tune=tune).with_defaults()
    assert recipe.tune is not None
    assert recipe.tune.distill == DistillConfig(teacher="org/m", revision=taken)


def test_chosen_models_are_kept() -> None:
    recipe = Recipe(name="a", model=MODEL, prune=PruneConfig(), eval=EvalConfig(models=("pruned",)))
    assert recipe.with_defaults() is recipe
