"""What a stage will need: parameters, peak memory and disk, estimated before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lors_cli.errors import LorsError, ResourceError
from lors_cli.evaluation.estimate import TASK_LENGTH
from lors_cli.machine import processes
from lors_cli.machine.devices import free_memory
from lors_cli.models.needs import Estimate
from lors_cli.models.size import ModelSize, model_size, try_size
from lors_cli.output import console
from lors_cli.output.console import gib
from lors_cli.pipeline.plans import StagePlan
from lors_cli.pruning import estimate as pruning_estimate
from lors_cli.recipe.schema import EvalConfig, ModelConfig, PruneConfig, TuneConfig
from lors_cli.tuning.estimate import _estimate_tune

GIB = 1 << 30
RUNTIME = GIB // 2
"""Bytes that Python and the libraries take whatever the model."""


def estimate(config: PruneConfig | TuneConfig | EvalConfig, size: ModelSize) -> Estimate:
    """A stage's needs, good to about a fifth: libraries, weights, activations, statistics, optimiser state.

    Args:
        config: the stage's settings.
        size: of the model it loads.
    """
    if isinstance(config, PruneConfig):
        parts = pruning_estimate.memory_parts(config, size)
        return _with_runtime(Estimate(sum(parts.values()), pruning_estimate.disk(config, size)))
    if isinstance(config, TuneConfig):
        return _with_runtime(_estimate_tune(config, size))
    tokens = config.batch_size * min(TASK_LENGTH, size.max_length)
    logits = tokens * size.vocab_size * (4 + size.bytes_a_weight)
    return _with_runtime(Estimate(size.num_bytes + logits, 64 << 20))


def _with_runtime(needs: Estimate) -> Estimate:
    return Estimate(needs.memory + RUNTIME, needs.disk)


def try_estimate(config: Any, model: ModelConfig) -> tuple[Estimate | None, str]:
    """An estimate where the model's shape is known, else why not.

    Args:
        config: the stage's settings.
        model: the model it loads.
    """
    try:
        size = model_size(model)
    except LorsError as error:
        return None, error.message
    if size is None:
        return None, "size unknown until the model's config.json is downloaded"
    return estimate(config, size), ""


def shortage(config: Any, model: ModelConfig) -> tuple[str, str] | None:
    """Why a stage cannot run in the memory that is free here, and what would fit; None if it can, or is not known.

    Args:
        config: the stage's settings; only pruning's needs are known well enough to refuse.
        model: the model it loads.
    """
    if not isinstance(config, PruneConfig):
        return None
    size = try_size(model)
    if size is None:
        return None
    free = free_memory(model.device)
    parts = pruning_estimate.memory_parts(config, size, processes.num_processes())
    offload, hidden = config.calibration.offload, parts["hidden_states"]
    if (offload == "cpu" and model.device.startswith("cuda")) or (offload == "auto" and hidden > free / 2):
        parts["hidden_states"] = 0  # they will be kept elsewhere
    needed = RUNTIME + sum(parts.values())
    if needed <= free:
        return None
    largest = ", ".join(
        f"{name.replace('_', ' ')} {gib(parts[name])}"
        for name in sorted(parts, key=parts.__getitem__, reverse=True)[:3]
    )
    fits = [words for words, other in pruning_estimate.smaller(config) if estimate(other, size).memory <= free]
    hint = f"This would fit: {fits[0]}" if fits else "Nothing that keeps the result would fit: use a larger machine."
    return f"prune needs about {gib(needed)} of memory, {gib(free)} are free ({largest}).", hint


def check_disk(plan: StagePlan) -> None:
    """Refuse a stage whose results don't fit on the disk.

    Raises:
        ResourceError: naming what is free and what is needed.
    """

    needed, _ = try_estimate(plan.config, plan.origin)
    free = free_disk(plan.folder)
    if needed is not None and needed.disk > free:
        raise ResourceError(
            f"{plan.stage} needs about {console.gib(needed.disk)} of disk in {plan.folder}; "
            f"{console.gib(free)} are free.",
            "Free some space or choose another --out; what was finished before is intact.",
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_memory(plan: StagePlan) -> None:
    """Refuse a stage that is to run and cannot fit in the memory that is free here.

    Raises:
        ResourceError: naming what is needed, what is free, and which settings would fit.
    """

    found = shortage(plan.config, plan.origin) if plan.status != "done" else None
    if found is not None:
        raise ResourceError(*found)
