"""The doors to the three stages. Nothing else in the pipeline or above it asks what kind of stage it has before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.evaluation import estimate as evaluation_estimate
from lors_cli.models.needs import RECORDS, Estimate
from lors_cli.models.size import ModelSize
from lors_cli.output.console import counted
from lors_cli.pruning import estimate as pruning_estimate
from lors_cli.pruning import stage as pruning
from lors_cli.recipe.schema import EvalConfig, ModelConfig, PruneConfig, TuneConfig
from lors_cli.tuning import estimate as tuning_estimate
from lors_cli.tuning import stage as tuning
from lors_cli.tuning.teacher import with_teacher

Config = PruneConfig | TuneConfig | EvalConfig


@dataclass(frozen=True)
class Stage:
    """What can be asked of a stage. A door takes the stage's own config first, then what it says.

    Args:
        run: models by role, folder, data_dir.
        needs: the model's size; peak memory and disk.
        operations: the model's size, number of models, data_dir; None where not known.
        describe: models by role; a few words for people.
        makes: the role of the model that comes out, None where scores do.
        fingerprint: of the one model it reads, data_dir; None for scores, which have theirs piece by piece.
        prepare: the model; the config with what depends on it filled in.
        shortage: the model and its size; why the free memory is too small, and what to do, where that is known.
    """

    run: Callable[[Any, dict[str, ModelConfig], Path, Path | None], None]
    needs: Callable[[Any, ModelSize], Estimate]
    operations: Callable[[Any, ModelSize, int, Path | None], float | None]
    describe: Callable[[Any, dict[str, ModelConfig]], str]
    makes: str | None = None
    fingerprint: Callable[[Any, str, Path | None], str] | None = None
    prepare: Callable[[Any, ModelConfig], Any] = lambda config, model: config
    shortage: Callable[[Any, ModelConfig, ModelSize], tuple[str, str] | None] = lambda config, model, size: None

    def leaves(self, config: Config, size: ModelSize) -> int:
        """Bytes on disk once it is done."""
        disk = self.needs(config, size).disk
        return min(size.num_bytes + RECORDS, disk) if self.makes else disk


def _prune(config: PruneConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    (model,) = models.values()
    pruning.prune(config, model, out, data_dir=data_dir)


def _pruning(config: PruneConfig, models: dict[str, ModelConfig]) -> str:
    share = f" {config.sparsity:g}" if config.pattern == "unstructured" else ""
    return f"{config.method} {config.pattern}{share}"


def _tune(config: TuneConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    (model,) = models.values()
    tuning.tune(config, model, out, data_dir=data_dir)


def _tuning(config: TuneConfig, models: dict[str, ModelConfig]) -> str:
    length = counted(config.max_steps, "step") if config.max_steps else counted(config.epochs, "epoch")
    length = f"{config.max_tokens:,} tokens" if config.max_tokens else length
    return f"{config.method} rank {config.rank} on {config.data.dataset}, {length}"


def _evaluate(config: EvalConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    from lors_cli.evaluation.stage import evaluate

    evaluate(config, models, out, data_dir=data_dir)


def _evaluation(config: EvalConfig, models: dict[str, ModelConfig]) -> str:
    tasks = config.tasks if len(config.tasks) < 3 else (f"{len(config.tasks)} tasks",)
    return f"{', '.join(models)}: {', '.join((*tasks, *config.perplexity))}"


STAGES = {
    "prune": Stage(
        run=_prune,
        needs=pruning_estimate.needs,
        operations=lambda config, size, num_models, data_dir: pruning_estimate.operations(config, size),
        describe=_pruning,
        makes="pruned",
        fingerprint=pruning.stage_fingerprint,
        shortage=pruning_estimate.shortage,
    ),
    "tune": Stage(
        run=_tune,
        needs=tuning_estimate.needs,
        operations=lambda config, size, num_models, data_dir: tuning_estimate.operations(config, size, data_dir),
        describe=_tuning,
        makes="tuned",
        fingerprint=tuning.stage_fingerprint,
        prepare=with_teacher,
    ),
    "eval": Stage(
        run=_evaluate,
        needs=evaluation_estimate.needs,
        operations=lambda config, size, num_models, data_dir: evaluation_estimate.operations(config, size, num_models),
        describe=_evaluation,
    ),
}
"""In the order of a run."""
