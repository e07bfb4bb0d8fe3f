"""`transformers.Trainer` for adapters: whole checkpoints, an honest log, a stop on a broken loss."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from lors_cli.data.samples import count_tokens
from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.machine import processes as parallel
from lors_cli.machine.memory import give_back_memory
from lors_cli.tuning.adapter import WEIGHTS_NAME, load_tensors
from lors_cli.tuning.attach import adapter_layers, adapter_tensors
from lors_cli.tuning.head import Loss
from lors_cli.tuning.norms import norm_shifts
from lors_cli.tuning.training import distributed
from lors_cli.tuning.training.guards import StepGuard, is_state
from lors_cli.tuning.training.stopping import StopCallback

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from lors_cli.recipe.schema import TuneConfig

MARKER_NAME = "lors.json"
PARTIAL_NAME = ".partial"


class StepSampler(Sampler[int]):
    """Shuffled samples, those of one optimiser step with the longest first.

    Its micro-batches then hold samples of like length, and the step, its loss and its gradient are those of the
    same samples in any order, at less padding.

    Args:
        lengths: tokens of every sample.
        step_size: samples of an optimiser step.
        seed: of the shuffle; each epoch has its own.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self.lengths, self.step_size, self.seed = lengths, step_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for first in range(0, len(order), self.step_size):
            yield from sorted(order[first : first + self.step_size], key=lambda index: -self.lengths[index])


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold adapters and its own state only, and appear by rename.

    Of several processes each has a Trainer that knows of no other: they meet in `training_step`, where the gradients
    of a step are added up, and the main one writes for all.

    Args:
        checkpoints: folder for `checkpoint-N`.
        fingerprint: of the stage; checkpoints of another are never resumed from.
        loss: computes it; None for the model's own.
        groups: what the optimiser trains, from `parameter_groups`.
        guard: of bad steps.
        keep_checkpoints: so many of the newest stay.
        model: with adapters, the only parameters that are trained.
        args: the Trainer's settings.
        **options: as for `transformers.Trainer`.
    """

    def __init__(
        self, *, checkpoints: Path, fingerprint: str, loss: Loss | None, groups: list[Any], guard: StepGuard,
        keep_checkpoints: int, model: PreTrainedModel, args: TrainingArguments, **options: Any,
    ) -> None:  # fmt: skip
        optimizer, settings = self.get_optimizer_cls_and_kwargs(args, model)
        settings["params"] = groups
        with parallel.unseen():
            super().__init__(model=model, args=args, optimizer_cls_and_kwargs=(optimizer, settings), **options)
        self.loss = loss
        if loss is not None:
            self.loss_is_scaled_for_ga = True
        self.checkpoints = checkpoints
        self.fingerprint = fingerprint
        self.guard = guard
        self.keep_checkpoints = keep_checkpoints
        self.tokens_seen = 0
        self._step_loss: torch.Tensor | float = 0.0
        self.stop = StopCallback()
        self.sums: distributed.StepSums | None = None
        if parallel.num_processes() > 1:
            self.sums = distributed.StepSums([parameter for group in groups for parameter in group["params"]])
        self._tokens = 0
        self._is_saving = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        samples = dataset.samples if isinstance(dataset, distributed.SamplesAndBlank) else dataset
        processes, micro_batch_size = parallel.num_processes(), self.args.train_batch_size
        step_size = micro_batch_size * self.args.gradient_accumulation_steps * processes
        sampler: Sampler[int] = SequentialSampler(samples)  # a stream is in order
        if isinstance(samples, list):
            sampler = StepSampler([len(sample["input_ids"]) for sample in samples], step_size, self.args.seed)
        if processes == 1:
            return sampler
        return distributed.RankSampler(sampler, step_size=step_size, micro_batch_size=micro_batch_size,
                                       rank=parallel.process_index(), num_processes=processes)  # fmt: skip

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The labels of a step, over all processes."""
        found = super()._get_num_items_in_batch(batch_samples, device)
        return parallel.add_up(found) if torch.is_tensor(found) else found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; its tokens are counted for the log. The last one of a step brings all processes together."""
        if self.sums is not None and self._tokens == 0 and not parallel.is_main():
            # dropout of its own, the same after a resumption
            torch.manual_seed(hash((self.args.seed, self.state.global_step, parallel.process_index())) % 2**63)
        self._tokens += count_tokens(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        if self.sums is None:
            self.tokens_seen, self._tokens = self.tokens_seen + self._tokens, 0
        elif self.accelerator.sync_gradients:
            tokens, self.stop.agreed = self.sums.add_up(self._step_loss, self._tokens, bool(self.stop.asked))
            self.tokens_seen += tokens
            self._step_loss, self._tokens = self.sums.loss, 0
        return loss.nan_to_num(0.0, 0.0, 0.0)  # the Trainer's running sum would stay broken

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step, its loss that of all processes."""
        if self.sums is not None and "loss" in logs:
            logs["loss"] = self.sums.loss
        super().log(logs, start_time)
        self.state.log_history.clear()  # log.jsonl has it all; this list would grow with every step and checkpoint

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, a sum over its tokens divided by those of the whole optimiser step."""
        if self.loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        num_items = kwargs.get("num_items_in_batch")
        if num_items is None:
            raise RuntimeError("the Trainer did not count the labels of this step")
        return self.loss(model, inputs, num_items)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm))
        loss, self._step_loss = float(self._step_loss), 0.0
        if self.guard.is_bad(loss, norm):
            step = self.state.global_step + 1
            if self.guard.exceeded:
                kept = latest_checkpoint(self.checkpoints, self.fingerprint)
                saved = f"{kept} is kept." if kept else "No checkpoint yet."
                hint = f"Lower learning_rate, use dtype: float32, or allow more with max_bad_steps. {saved}"
                raise UsageError(self.guard.broken(step), hint)
            self.guard.announce(step)
            model.zero_grad(set_to_none=True)  # without gradients the optimiser touches neither weights nor its state
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints / PARTIAL_NAME) if self._is_saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not parallel.is_main():
            return
        partial = self.checkpoints / PARTIAL_NAME
        shutil.rmtree(partial, ignore_errors=True)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        name = f"checkpoint-{self.state.global_step}"
        atomic.write_json(partial / name / MARKER_NAME, {"fingerprint": self.fingerprint, "guard": self.guard.state()})
        for file in (partial / name).iterdir():
            atomic.sync_file(file)
        atomic.sync_folder(partial / name)
        if self.checkpoints / name in whole_checkpoints(self.checkpoints, self.fingerprint):  # of the same step
            shutil.rmtree(partial)
            return
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        os.replace(partial / name, self.checkpoints / name)
        atomic.sync_folder(self.checkpoints)
        shutil.rmtree(partial)
        for old in whole_checkpoints(self.checkpoints, self.fingerprint)[: -self.keep_checkpoints]:
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        from safetensors.torch import save

        folder = Path(output_dir or str(self.checkpoints))
        assert self.model is not None
        atomic.write_bytes(folder / WEIGHTS_NAME, save(adapter_tensors(self.model), metadata={"format": "pt"}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model or self.model
        assert target is not None
        load_tensors(target, Path(resume_from_checkpoint) / WEIGHTS_NAME)
        marker = atomic.read_json(Path(resume_from_checkpoint) / MARKER_NAME) or {}
        if "guard" in marker:  # checkpoints of earlier versions have none
            self.guard.restore(marker["guard"])


def whole_checkpoints(folder: Path, fingerprint: str) -> list[Path]:
    """The complete checkpoints of this stage in `folder`, oldest first; others are passed over.

    Args:
        folder: may be missing.
        fingerprint: of the stage.
    """
    needed = (WEIGHTS_NAME, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        marker = atomic.read_json(path / MARKER_NAME)
        if not isinstance(marker, dict) or marker.get("fingerprint") != fingerprint:
            continue
        if "guard" in marker and not is_state(marker["guard"]):  # earlier versions have none
            continue
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and all((path / name).is_file() for name in needed):
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The newest complete checkpoint of this stage, or None."""
    found = whole_checkpoints(folder, fingerprint)
    return found[-1] if found else None


class TrimCallback(TrainerCallback):
    """After every step on a CPU: activations of varying length leave holes in the heap, which are given back."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give them back; a GPU's memory is not on this heap."""
        if args.device.type == "cpu":
            give_back_memory()


def parameter_groups(model: nn.Module, config: TuneConfig) -> list[dict[str, Any]]:
    """What the optimiser trains: every lora_A, every lora_B, and the shifts of norms, each at its rate.

    Args:
        model: with adapters.
        config: its rates and weight decay; shifts are not decayed.
    """
    layers = adapter_layers(model).values()
    rate, decay = config.learning_rate, config.weight_decay
    groups = [
        {"params": [layer.lora_A for layer in layers], "lr": rate, "weight_decay": decay},
        {"params": [layer.lora_B for layer in layers], "lr": config.loraplus_lr_ratio * rate, "weight_decay": decay},
    ]
    shifts = list(norm_shifts(model).values())
    if shifts:
        groups.append({"params": shifts, "lr": config.norms_lr_ratio * rate, "weight_decay": 0.0})
    return groups


def training_arguments(config: TuneConfig, checkpoints: Path, device: torch.device) -> TrainingArguments:
    """The Trainer's settings for a tune config.

    Args:
        config: the stage's settings.
        checkpoints: where `checkpoint-N` go.
        device: of the model.
    """
    processes = parallel.num_processes()
    micro_batch_size = distributed.micro_batch_size(config, processes)
    if config.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints.parent / "tensorboard")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    settings: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (micro_batch_size * processes),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": config.min_learning_rate},
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "seed": config.seed,
        "data_seed": config.seed,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": ["tensorboard"] if config.tensorboard and parallel.is_main() else [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "use_cpu": device.type == "cpu",
    }
    with parallel.unseen():
        arguments = TrainingArguments(**settings)
    # By itself the Trainer takes every GPU it sees (DataParallel), and the first of them.
    arguments.__dict__["_setup_devices"] = device
    arguments._n_gpu = int(device.type == "cuda")
    return arguments
