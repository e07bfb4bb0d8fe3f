"""Settings as they are stored and shown: what follows from other settings is said too."""

from __future__ import annotations

from dataclasses import replace

from lors_cli.recipe.rules import implied_sparsity
from lors_cli.recipe.schema import PruneConfig, Recipe, TuneConfig


def resolved_prune(config: PruneConfig) -> PruneConfig:
    """Pruning's settings with what pattern and method imply."""
    sparsity = implied_sparsity(config.pattern) if config.sparsity is None else config.sparsity
    return replace(config, sparsity=sparsity, true_sequential=config.sequential)


def resolved_tune(config: TuneConfig) -> TuneConfig:
    """Tuning's settings with what the method implies."""
    found = replace(config, init=config.start, rounding=config.weight_rounding,
                    learning_rate=config.peak_learning_rate)  # fmt: skip
    return found if config.val_size is None else replace(found, load_best_model_at_end=config.loads_best)


def resolved_recipe(recipe: Recipe) -> Recipe:
    """A recipe with its defaults and what its stages' settings imply."""
    found = recipe.with_defaults()
    return replace(
        found, prune=found.prune and resolved_prune(found.prune), tune=found.tune and resolved_tune(found.tune)
    )
