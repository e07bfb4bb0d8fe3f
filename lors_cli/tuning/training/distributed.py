"""One optimiser step by several processes: which samples each takes, and the sums that make them one.

A step has the samples, the loss and the gradient that one process would have. Each process divides its summed losses by
the labels of the whole step, so the gradient of the step is a plain sum over the processes. The adapters are small: one
all-reduce after the last micro-batch adds up all gradients, with the loss beside them, where torch's
DistributedDataParallel would reduce in buckets during backward. So the model needs no wrapper, whatever its autograd
functions do, and sharded weights (`sharding`) go through the same sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from lors_cli.data.samples import IGNORED, Sample
from lors_cli.errors import UsageError
from lors_cli.machine import processes as parallel
from lors_cli.output import console

if TYPE_CHECKING:
    from torch import nn

    from lors_cli.recipe.schema import TuneConfig

BLANK = -1
"""The index of a sample without labels, which fills a step that has too few for all processes."""


def micro_batch_size(config: TuneConfig, num_processes: int) -> int:
    """Samples a forward pass of each process.

    Args:
        config: its batch_size is that of a step over all processes.
        num_processes: how many share a step.

    Raises:
        UsageError: they cannot share it evenly.
    """
    if num_processes == 1:
        return config.micro_batch_size
    share, rest = divmod(config.batch_size, num_processes)
    if rest:
        raise UsageError(
            f"batch_size: {config.batch_size} samples a step cannot be shared by {num_processes} processes.",
            f"Give a multiple of {num_processes}: it counts the samples of all processes together.",
        )
    size = config.per_device_batch_size
    if size is not None and share % size:
        raise UsageError(
            f"batch_size: {config.batch_size} is not a multiple of per_device_batch_size: {size} times "
            f"{num_processes} processes.",
            f"Each process takes {share} samples a step: give a per_device_batch_size that divides them.",
        )
    return replace(config, batch_size=share).micro_batch_size


def describe(config: TuneConfig) -> str:
    """In words: how a step is shared, empty when there is nothing to say.

    Args:
        config: of the stage.
    """
    processes = parallel.num_processes()
    if processes == 1:
        return "parallelism: fsdp is for several processes, and this is one" if config.parallelism == "fsdp" else ""
    size = micro_batch_size(config, processes)
    passes = config.batch_size // (size * processes)
    held = "a shard of the frozen weights" if config.parallelism == "fsdp" else "the whole model"
    return f"{processes} processes, each with {held}: a step is {passes} forward passes of {size} samples in each"


class SamplesAndBlank(Sequence[Sample]):
    """Samples, and at `BLANK` one that has no label.

    Args:
        samples: of the run.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if index != BLANK:
            return self.samples[index]
        first = self.samples[0]
        blank = {"input_ids": first["input_ids"][:1], "labels": [IGNORED]}
        return {**blank, "position_ids": [0]} if "position_ids" in first else blank


class RankSampler(Sampler[int]):
    """What one of several processes takes of the samples that one process would take.

    Micro-batches are dealt out in turn, so that all processes meet samples of like length at a time; a step with too
    few samples for that (the last of an epoch) is filled up with blanks.

    Args:
        whole: indices in the order of one process, step by step.
        step_size: samples of an optimiser step.
        micro_batch_size: samples a forward pass of a process.
        rank: of this process.
        num_processes: how many there are.
    """

    def __init__(
        self, whole: Sampler[int], *, step_size: int, micro_batch_size: int, rank: int, num_processes: int
    ) -> None:
        self.whole, self.step_size, self.micro_batch_size = whole, step_size, micro_batch_size
        self.rank, self.num_processes = rank, num_processes

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        if hasattr(self.whole, "set_epoch"):
            self.whole.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.whole), self.step_size)  # type: ignore[arg-type]
        turn = self.micro_batch_size * self.num_processes
        return (full * self.step_size + -(-rest // turn) * turn) // self.num_processes

    def __iter__(self) -> Iterator[int]:
        step: list[int] = []
        for index in self.whole:
            step.append(index)
            if len(step) == self.step_size:
                yield from self._mine(step)
                step = []
        yield from self._mine(step)

    def _mine(self, step: list[int]) -> Iterator[int]:
        filled = step + [BLANK] * (-len(step) % (self.micro_batch_size * self.num_processes))
        places = step_positions(0, batch_size=len(filled), micro_batch_size=self.micro_batch_size, rank=self.rank,
                                world_size=self.num_processes)  # fmt: skip
        for place in places:
            yield filled[place]


class StepSums:
    """Adds up, at the end of each step, what the processes found in it.

    Args:
        parameters: those that are trained, alike in every process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.loss = 0.0
        """Of the last step, over all processes."""
        for parameter in self.parameters:
            parallel.send_to_all(parameter.data, 0)

    def add_up(self, loss: torch.Tensor, tokens: int, asked_to_stop: bool) -> tuple[int, bool]:
        """Leave the gradients of the whole step in the parameters.

        A parameter that took part in no process keeps no gradient, as with one process.

        Args:
            loss: this process's share of the step's loss.
            tokens: it has seen in the step.
            asked_to_stop: whether it was interrupted.

        Returns:
            The tokens of all processes, and whether one of them was interrupted.
        """
        device = self.parameters[0].device
        gradients = [parameter.grad for parameter in self.parameters]
        exact = torch.float64 if any(each.dtype == torch.float64 for each in self.parameters) else torch.float32
        told = torch.tensor(
            [float(loss), tokens, asked_to_stop, *(each is not None for each in gradients)], dtype=exact, device=device
        )
        parts = [
            torch.zeros_like(parameter).view(-1) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
        ]
        total = parallel.add_up(torch.cat([told, *(part.to(exact) for part in parts)]))
        told, *found = total.split([len(told), *(len(part) for part in parts)])
        numbers = told.tolist()
        for parameter, gradient, took_part in zip(self.parameters, found, numbers[3:], strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if took_part else None
        self.loss = numbers[0]
        return round(numbers[1]), numbers[2] > 0


def say_how(config: TuneConfig) -> None:
    """Tell the user how a step is shared."""
    text = describe(config)
    if text:
        console.info(f"  {text}")


def step_positions(step: int, *, batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> list[int]:
    """The positions that one of several processes trains on in an optimiser step.

    A step takes `batch_size` consecutive positions whatever the number of processes; micro-batches go to the
    processes in turn, as accelerate deals them.

    Args:
        step: from 0.
        batch_size: samples a step, over all processes.
        micro_batch_size: samples a forward pass of one process; times world_size it divides batch_size.
    """
    first, stride = step * batch_size, micro_batch_size * world_size
    return [
        start + rank * micro_batch_size + inside
        for start in range(first, first + batch_size, stride)
        for inside in range(micro_batch_size)
    ]
