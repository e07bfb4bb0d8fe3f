"""The training loop: setup, steps, save. One forward and backward pass a micro-batch, one update a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from lors_cli.data.samples import IGNORED, PadCollator, Sample, count_tokens, rounded_up
from lors_cli.errors import UsageError
from lors_cli.files import atomic, locks
from lors_cli.machine import processes as parallel
from lors_cli.machine.memory import give_back_memory
from lors_cli.recipe.schema import TuneConfig
from lors_cli.tuning.adapter import WEIGHTS_NAME, load_tensors
from lors_cli.tuning.attach import adapter_layers, adapter_tensors
from lors_cli.tuning.head import Loss
from lors_cli.tuning.lors import choose_gradients
from lors_cli.tuning.norms import norm_shifts
from lors_cli.tuning.training import checkpoints, sampling
from lors_cli.tuning.training.distributed import micro_batch_size
from lors_cli.tuning.training.guards import StepGuard
from lors_cli.tuning.training.optimisers import make_optimizer, make_schedule
from lors_cli.tuning.training.randomness import random_state, read_random_state, restore_random_state
from lors_cli.tuning.training.stopping import StopRequest
from lors_cli.tuning.training.validation import Validation, held_out_loss


class AdapterTrainer:
    """Trains what is put on a model, and nothing else of it.

    Of several processes each has a trainer; they meet once a step, where the gradients are added up, and the main one
    writes for all.

    Args:
        model: with adapters, on its device.
        samples: a list, shuffled in each epoch, or a stream, taken in order.
        collate: makes a batch of them.
        loss: of a batch, a share of its step's.
        folder: for `checkpoint-N`.
        fingerprint: of the stage; checkpoints of another are never resumed from.
        held_out: samples whose loss is measured during training.
    """

    def __init__(
        self, config: TuneConfig, model: PreTrainedModel, samples: Sequence[Sample], collate: PadCollator, loss: Loss,
        folder: Path, fingerprint: str, held_out: Sequence[Sample] = (),
    ) -> None:  # fmt: skip
        self.config, self.model, self.samples, self.collate, self.loss = config, model, samples, collate, loss
        self.folder, self.fingerprint = folder, fingerprint
        self.step = 0
        """Optimiser steps done."""
        self.started, self.earlier_s = time.monotonic(), 0.0
        """When this call of the stage began, and the seconds of those whose checkpoint it goes on from."""
        self.num_steps = num_steps(config, len(samples))
        self.size = micro_batch_size(config, parallel.num_processes())
        self.guard = StepGuard(config.max_bad_steps, config.spike_factor)
        self.validation = Validation(config, held_out, self.num_steps)
        self.stop = StopRequest()
        self.unlogged: dict[str, Any] | None = None
        """The row of a step that is done, while its held-out loss is yet to be measured."""
        groups = parameter_groups(model, config)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        for parameter in self.trained:
            parallel.send_to_all(parameter.data, 0)
        self.optimizer = make_optimizer(config, groups)
        self.schedule = make_schedule(config, self.optimizer, self.num_steps)

    def run(self, report: Callable[[dict[str, Any]], None]) -> None:
        """Every step from here to the last, or to the one in which the run is asked to stop; the last one is saved.

        `report` takes the row of the log that belongs to a step.
        """
        self.model.train()
        since = time.monotonic()
        while self.unlogged or not self.is_done:
            is_stopping = False
            if self.unlogged is None:
                before = random_state()
                found = self.gradients()
                if found is None:  # the step is done again from its start when the run goes on
                    restore_random_state(before)
                    self.save()
                    return
                loss, tokens, is_stopping = found
                rate = self.update(loss)
                now = time.monotonic()
                self.unlogged = self.row(rate, tokens / max(now - since, 1e-9))
                since = now
            if self.validation.is_due(self.step):
                if is_stopping or not self.validate(self.unlogged):  # it is measured when the run goes on
                    self.save()
                    return
                since = time.monotonic()
            report(self.unlogged)
            self.unlogged = None
            is_kept = self.step % self.config.save_steps == 0 or self.step == self.validation.kept_step
            if is_stopping or is_kept or self.is_done:
                self.save()
            if is_stopping:
                return

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or training ends early."""
        return self.step >= self.num_steps or self.validation.is_over

    def update(self, loss: float) -> float:
        """One optimiser step of the gradients that are there, whose loss is given; the learning rate it had."""
        norm = float(clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf))
        if self.guard.is_bad(loss, norm):
            self.leave_out()
        rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.model.zero_grad()
        self.step += 1
        if self.model.device.type == "cpu":  # activations of varying length leave holes in the heap
            give_back_memory()
        return rate

    def validate(self, row: dict[str, Any]) -> bool:
        """Add the held-out loss to a step's row; False if it was not measured to its end."""
        loss = held_out_loss(self.model, self.validation.samples, self.collate, self.loss, self.size, self.stop)
        if loss is not None:
            self.validation.judge(self.step, loss)
            row["val_loss"] = loss if math.isfinite(loss) else None
        return loss is not None

    def gradients(self) -> tuple[float, int, bool] | None:
        """The gradients of the next step, its loss, its tokens, and whether it is the last before a stop.

        None if this process, being alone, was asked to stop within the step.
        """
        processes, rank = parallel.num_processes(), parallel.process_index()
        batch_size, seed = self.config.batch_size, self.config.seed
        if sampling.place_in_epoch(self.step, len(self.samples), batch_size)[1] == 0:
            # as torch's DataLoader does, so that dropout draws what it drew in earlier versions
            torch.empty((), dtype=torch.int64).random_()
        chosen = sampling.step_samples(self.samples, self.step, batch_size=batch_size, seed=seed)
        batches = [self.collate([sampling.sample_at(self.samples, index) for index in indices])
                   for indices in sampling.micro_batches(chosen, self.size, rank, processes)]  # fmt: skip
        labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        num_labels = parallel.add_up(torch.tensor(float(labels), device=self.model.device))
        if rank > 0:  # dropout of its own, the same after a resumption
            torch.manual_seed(hash((seed, self.step, rank)) % 2**63)
        choose_gradients(self.model, self.config.gradient, self.step)
        is_half = self.model.dtype == torch.float16  # a gradient over so many labels would be lost: divided last
        loss = torch.zeros((), device=self.model.device)
        for place, batch in enumerate(batches, 1):
            loss = loss + self.micro_batch(batch, torch.ones_like(num_labels) if is_half else num_labels)
            if self.stop.asked and processes == 1 and place < len(batches):
                return None
        if is_half:
            loss = loss / num_labels
            for gradient in (parameter.grad for parameter in self.trained if parameter.grad is not None):
                gradient.div_(num_labels)
        told = [float(loss), sum(map(count_tokens, batches)), bool(self.stop.asked)]
        total, tokens, asked = parallel.add_up_gradients(self.trained, told)
        return total, round(tokens), asked > 0

    def micro_batch(self, batch: dict[str, torch.Tensor], divisor: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the loss, summed over the batch's tokens and divided."""
        loss = self.loss(self.model, {key: value.to(self.model.device) for key, value in batch.items()}, divisor)
        loss.backward()
        return loss.detach()

    def leave_out(self) -> None:
        """Make the step just judged one that changes nothing; a UsageError if there are too many of them."""
        if self.guard.exceeded:
            kept = checkpoints.latest_checkpoint(self.folder, self.fingerprint)
            saved = f"{kept} is kept." if kept else "No checkpoint yet."
            hint = f"Lower learning_rate, use dtype: float32, or allow more with max_bad_steps. {saved}"
            raise UsageError(self.guard.broken(self.step + 1), hint)
        self.guard.announce(self.step + 1)
        self.model.zero_grad()  # without gradients the optimiser touches neither weights nor its state

    def row(self, learning_rate: float, tokens_per_s: float) -> dict[str, Any]:
        """The step just done, for the log; of one that was left out, what is not finite is None."""
        loss, norm = (value if math.isfinite(value) else None for value in (self.guard.loss, self.guard.norm))
        row = {"step": self.step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm,
               "tokens_per_s": round(tokens_per_s, 1), "epoch": round(self.epoch(), 4)}  # fmt: skip
        return {**row, "skipped": self.guard.reason} if self.guard.reason else row

    def epoch(self) -> float:
        """Passes over the data so far."""
        return sampling.epochs_after(self.step, len(self.samples), batch_size=self.config.batch_size,
                                     turn_size=self.size * parallel.num_processes())  # fmt: skip

    def save(self) -> None:
        """A checkpoint of the step just done; a UsageError if another process has taken the folder over."""

        def write(folder: Path) -> None:
            from safetensors.torch import save

            weights = save(adapter_tensors(self.model), metadata={"format": "pt"})
            atomic.write_bytes(folder / WEIGHTS_NAME, weights)
            torch.save(self.optimizer.state_dict(), folder / checkpoints.OPTIMIZER_NAME)
            torch.save(self.schedule.state_dict(), folder / checkpoints.SCHEDULE_NAME)
            torch.save(random_state(), folder / checkpoints.RANDOM_NAME)
            state = {"global_step": self.step, "max_steps": self.num_steps, "epoch": self.epoch()}
            atomic.write_json(folder / checkpoints.STATE_NAME, state)

        if parallel.is_main():
            locks.check(self.folder)
            marker: dict[str, Any] = {"fingerprint": self.fingerprint, "guard": self.guard.state()}
            marker["dtype"] = str(self.model.dtype)
            marker["elapsed_s"] = round(self.elapsed_s, 2)
            if self.validation.samples:
                marker.update(validation=self.validation.state(), best_step=self.validation.kept_step,
                              unlogged=self.unlogged)  # fmt: skip
            checkpoints.write_checkpoint(self.folder, self.step, marker, write, keep=self.config.keep_checkpoints)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this stage."""
        load_tensors(self.model, checkpoint / WEIGHTS_NAME)
        for part, name in ((self.optimizer, checkpoints.OPTIMIZER_NAME), (self.schedule, checkpoints.SCHEDULE_NAME)):
            part.load_state_dict(torch.load(checkpoint / name, map_location="cpu", weights_only=True))
        restore_random_state(read_random_state(checkpoint / checkpoints.RANDOM_NAME))
        marker: Any = atomic.read_json(checkpoint / checkpoints.MARKER_NAME)
        self.guard.restore(marker["guard"])
        if "validation" in marker:
            self.validation.restore(marker["validation"])
            self.unlogged = marker["unlogged"]
        self.earlier_s = marker.get("elapsed_s", 0.0)  # earlier versions noted none
        self.step = checkpoints.step_of(checkpoint)

    @property
    def elapsed_s(self) -> float:
        """Of all calls that led here."""
        return self.earlier_s + time.monotonic() - self.started

    def take_best(self) -> None:
        """Put the adapters of the best held-out loss on the model.

        Raises:
            UsageError: no such loss was finite.
        """
        best = self.validation.best_step
        if best is None:
            raise UsageError("no held-out loss was finite, so no step is the best.", "Lower learning_rate.")
        if best != self.step:
            load_tensors(self.model, self.folder / f"checkpoint-{best}" / WEIGHTS_NAME)


def num_steps(config: TuneConfig, num_samples: int) -> int:
    """Optimiser steps of the whole run; the last one of an epoch may have fewer samples."""
    return config.max_steps or rounded_up(config.epochs, math.ceil(num_samples / config.batch_size))


def parameter_groups(model: nn.Module, config: TuneConfig) -> list[dict[str, Any]]:
    """What the optimiser trains: every lora_A, every lora_B, and the shifts of norms, not decayed, each at its rate."""
    layers = adapter_layers(model).values()
    rate, decay = config.peak_learning_rate, config.weight_decay
    groups = [
        {"params": [layer.lora_A for layer in layers], "lr": rate, "weight_decay": decay},
        {"params": [layer.lora_B for layer in layers], "lr": config.loraplus_lr_ratio * rate, "weight_decay": decay},
    ]
    shifts = list(norm_shifts(model).values())
    if shifts:
        groups.append({"params": shifts, "lr": config.norms_lr_ratio * rate, "weight_decay": 0.0})
    return groups
