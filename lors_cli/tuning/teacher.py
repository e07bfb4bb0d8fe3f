"""The dense model that a tuned one may learn from: which it is, and loading it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.machine import processes
from lors_cli.output import console
from lors_cli.recipe.schema import DistillConfig, ModelConfig, TuneConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lors_cli.data.samples import Sample
    from lors_cli.tuning.head import Teacher
    from lors_cli.tuning.teacher_cache import CachedTeacher


ROUNDS = 3
"""Of looks at what is missing: another run may write while processes deal it out, or remove a broken file."""


def with_teacher(config: TuneConfig, model: ModelConfig) -> TuneConfig:
    """The config with `distill.teacher` filled in: by default the model, and commit, that was pruned."""
    if config.distill is None or config.distill.teacher is not None:
        return config
    folder = Path(model.path)
    record = records.read_record(folder)
    if record is None or record.stage != "prune" or "path" not in record.inputs:
        raise UsageError(
            f"distill: {model.path} does not say which dense model it was pruned from.", "Give distill.teacher."
        )
    commit = record.metrics.get("commit") if config.distill.revision == DistillConfig.revision else None
    distill = replace(config.distill, teacher=str(record.inputs["path"]), revision=commit or config.distill.revision)
    return replace(config, distill=distill)


def teacher_model(config: DistillConfig) -> ModelConfig:
    """Where the teacher is loaded from."""
    assert config.teacher is not None
    return ModelConfig(path=config.teacher, revision=config.revision)


def load_teacher(
    config: DistillConfig, network: PreTrainedModel, batch: dict[str, torch.Tensor], obstacle: str
) -> Teacher:
    """The teacher on the student's device, in its number format.

    Args:
        batch: with labels, to try the teacher's head on.
        obstacle: why the student's head cannot be chunked, if so.
    """
    from lors_cli.models.loading import load_model
    from lors_cli.tuning.head import Teacher, why_not_chunked

    refuse_obstacle(obstacle)
    console.info(f"  loading the teacher {config.teacher}")
    source = replace(teacher_model(config), dtype=str(network.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    model = load_model(source, device=network.device)
    refuse_obstacle(why_not_chunked(model, batch))
    sizes = [each.get_output_embeddings().weight.shape[0] for each in (network, model)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"distill: {config.teacher} knows {sizes[1]} tokens, the sparse model {sizes[0]}.")
    return Teacher(model, config.weight, config.temperature)


def refuse_obstacle(obstacle: str) -> None:
    """Refuse a model whose head cannot be chunked, and why, if so."""
    if obstacle:
        raise UsageError(f"distill: it needs predictions that are the head's plain outputs: {obstacle}.")


def cached_teacher(
    config: DistillConfig, network: PreTrainedModel, batch: dict[str, torch.Tensor], obstacle: str,
    samples: Iterable[Sample],
) -> CachedTeacher:  # fmt: skip
    """What the teacher says of these samples, from disk; it is loaded only if something of it is missing there.

    Raises:
        ResourceError: there is no room for what is missing.
    """
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.tuning.teacher_cache import CachedTeacher, TeacherCache

    refuse_obstacle(obstacle)
    assert config.cache is not None
    cache = TeacherCache(config.cache, model_fingerprint(teacher_model(config)),
                         network.get_output_embeddings().weight.shape[0], network.device,
                         str(network.dtype).removeprefix("torch."))  # fmt: skip
    cache.look()
    missing, teacher = cache.missing(samples), None
    for _ in range(ROUNDS):
        if not any(processes.gather(bool(missing))):
            if teacher is None:
                console.info(f"  teacher's cache: {cache.folder}, all there")
            return CachedTeacher(cache, config.weight, config.temperature)
        processes.from_main(partial(cache.check_room, missing))
        teacher = teacher or load_teacher(config, network, batch, obstacle)
        cache.fill(missing, teacher)
        processes.gather(None)  # all have written
        cache.look()
        missing = {key: sample for key, sample in missing.items() if key not in cache}
    raise UsageError(
        f"distill.cache: the processes do not see one another's files in {cache.folder}.",
        "Set LORS_CACHE_DIR to a folder that all machines share.",
    )
