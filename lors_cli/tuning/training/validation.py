"""The loss of held-out samples during training, and what follows from it: the best step, and an early end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from lors_cli.data.samples import IGNORED, PadCollator, Sample
from lors_cli.machine import processes as parallel
from lors_cli.recipe.schema import TuneConfig
from lors_cli.tuning.head import Loss, causal_lm_loss, model_loss
from lors_cli.tuning.training.randomness import undisturbed
from lors_cli.tuning.training.sampling import micro_batches, sample_at
from lors_cli.tuning.training.stopping import StopRequest

EVALUATIONS = 10
"""Held-out losses of a run that does not say how many."""


class Validation:
    """When the held-out loss is due, which was the best, and whether training is to end.

    Only a loss below all before it is an improvement; one that is not finite is none.
    """

    def __init__(self, config: TuneConfig, samples: Sequence[Sample], num_steps: int) -> None:
        self.samples = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
        self.every = config.eval_steps or math.ceil(num_steps / EVALUATIONS)
        self.num_steps, self.patience, self.loads_best = num_steps, config.early_stopping_patience, config.loads_best
        self.loss = self.best_loss = math.inf
        """The latest, and the best."""
        self.best_step: int | None = None
        self.without_gain = 0
        """Losses since the best one."""

    def is_due(self, step: int) -> bool:
        """Whether the loss after this step is wanted."""
        return bool(self.samples) and (step % self.every == 0 or step == self.num_steps)

    def judge(self, step: int, loss: float) -> None:
        """Take note of the loss after a step."""
        self.loss = loss
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.without_gain = loss, step, 0
        else:
            self.without_gain += 1

    @property
    def is_over(self) -> bool:
        """Whether training is to end early."""
        return self.patience is not None and self.without_gain >= self.patience

    @property
    def kept_step(self) -> int | None:
        """The step whose checkpoint is to stay, because the merged model may be made of it."""
        return self.best_step if self.loads_best else None

    @property
    def text(self) -> str:
        """The latest loss in words."""
        if self.without_gain:
            return f"held-out loss {self.loss:.4f}, best {self.best_loss:.4f} at step {self.best_step}"
        return f"held-out loss {self.loss:.4f}, the best so far"

    def metrics(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Of a run whose log is given, for its record, and the step that the model is of; empty without losses."""
        losses = [row["val_loss"] for row in rows if "val_loss" in row]
        if not losses:
            return {}
        best = self.best_loss if self.best_step is not None else None
        return {
            "val_loss_first": _rounded(losses[0]), "val_loss_best": _rounded(best),
            "val_loss_last": _rounded(losses[-1]), "val_best_step": self.best_step,
            "model_step": self.best_step if self.loads_best else rows[-1]["step"],
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        loss = self.best_loss if self.best_step is not None else None
        return {"best_step": self.best_step, "best_loss": loss, "without_gain": self.without_gain}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state`."""
        self.best_step, self.without_gain = state["best_step"], state["without_gain"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]


def held_out_loss(
    model: PreTrainedModel, samples: Sequence[Sample], collate: PadCollator, loss: Loss, size: int, stop: StopRequest
) -> float | None:
    """Mean cross-entropy over all labels of the samples, in float32, without dropout; several processes share them.

    Args:
        loss: that is trained with; a teacher's part in it is left out, so that runs compare.
        size: samples a forward pass.

    Returns:
        None if a process was asked to stop: they agree on that before every forward pass.
    """
    entropy = model_loss if loss is model_loss else causal_lm_loss
    total, labels = 0.0, 0
    with undisturbed(model):
        order, rank = list(range(len(samples))), parallel.process_index()
        for indices in micro_batches(order, size, rank, parallel.num_processes()):
            if parallel.anyone(bool(stop.asked)):  # all have as many batches
                return None
            batch = collate([sample_at(samples, index) for index in indices])
            found = entropy(model, {key: value.to(model.device) for key, value in batch.items()}, 1.0)
            number = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(found) if number else 0.0  # blanks have none
            labels += number
    parts = parallel.gather((total, labels))
    return sum(part for part, _ in parts) / sum(count for _, count in parts)


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 6)
