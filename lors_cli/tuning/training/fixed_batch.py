"""The loss of the same few samples before and after training: losses of single steps are of different samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lors_cli.data.samples import IGNORED, Sample
from lors_cli.tuning.attach import adapter_layers
from lors_cli.tuning.norms import norm_shifts
from lors_cli.tuning.training.randomness import undisturbed
from lors_cli.tuning.training.sampling import step_samples

if TYPE_CHECKING:
    from torch import nn

    from lors_cli.data.samples import TuneData
    from lors_cli.recipe.schema import TuneConfig
    from lors_cli.tuning.training.trainer import AdapterTrainer

NUM_SAMPLES = 16


@dataclass(frozen=True)
class FixedBatch:
    """Samples, read once, their indices, and whether training does without them."""

    samples: list[Sample]
    indices: list[int]
    held_out: bool


def choose(trainer: AdapterTrainer, data: TuneData) -> FixedBatch:
    """The samples for a trainer's run."""
    return chosen(trainer.config, trainer.num_steps, data)


def chosen(config: TuneConfig, num_steps: int, data: TuneData) -> FixedBatch:
    """Of held-out samples the first; else the last that the run never takes, or, if too few, the first that it takes.

    Training takes what it would take anyway: nothing is kept from it here.
    """
    if data.held_out:
        few = list(data.held_out[:NUM_SAMPLES])
        return FixedBatch(few, list(range(len(few))), held_out=True)
    number = len(data.samples)
    if data.num_steps is None and num_steps * config.batch_size + NUM_SAMPLES <= number:
        taken: set[int] = set()
        for step in range(num_steps):
            taken.update(step_samples(data.samples, step, batch_size=config.batch_size, seed=config.seed))
        if config.start != "kaiming":
            taken.update(data.first_drawn(config.init_samples, config.seed))
        left = [index for index in range(number) if index not in taken][-NUM_SAMPLES:]
        if len(left) == NUM_SAMPLES:
            return FixedBatch([data.samples[index] for index in left], left, held_out=True)
    first = data.first_drawn(NUM_SAMPLES, config.seed)
    return FixedBatch([data.samples[index] for index in first], first, held_out=False)


def measure(trainer: AdapterTrainer, batch: FixedBatch, *, untrained: bool = False) -> float:
    """The mean loss of the batch's labels, without dropout; weights and random generators are left as they were.

    It costs the forward pass of `NUM_SAMPLES` samples.

    Args:
        untrained: of the sparse model as it was before the first step, also in a run that resumes from a checkpoint.
    """
    model, samples, size = trainer.model, batch.samples, trainer.size
    batches = [trainer.collate(samples[first : first + size]) for first in range(0, len(samples), size)]
    num_labels = torch.tensor(float(sum(int((each["labels"][:, 1:] != IGNORED).sum()) for each in batches)))
    with undisturbed(model), _without_updates(model, untrained):
        device = model.device
        losses = [trainer.loss(model, {key: value.to(device) for key, value in each.items()}, num_labels.to(device))
                  for each in batches]  # fmt: skip
        return float(sum(map(float, losses)))


@contextmanager
def _without_updates(model: nn.Module, untrained: bool) -> Iterator[None]:
    """What is trained as it starts: every update is zero where lora_B, and a norm's shift, is."""
    trained = [layer.lora_B for layer in adapter_layers(model).values()] + list(norm_shifts(model).values())
    kept = [parameter.clone() for parameter in trained] if untrained else []
    for parameter in trained if untrained else ():
        parameter.zero_()
    try:
        yield
    finally:
        for parameter, values in zip(trained, kept, strict=False):
            parameter.copy_(values)
