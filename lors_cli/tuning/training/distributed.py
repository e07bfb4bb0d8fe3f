"""One optimiser step by several processes: how they share it, and the sum that makes it one.

A step has the samples, the loss and the gradient that one process would have. Each process divides its summed losses by
the labels of the whole step, so the gradient of the step is a plain sum over the processes: one all-reduce after the
last micro-batch, with the loss beside it. The model needs no wrapper, and sharded weights go through the same sum.
"""

from __future__ import annotations

from dataclasses import replace

from lors_cli.errors import UsageError
from lors_cli.machine import processes as parallel
from lors_cli.output import console
from lors_cli.recipe.schema import TuneConfig


def micro_batch_size(config: TuneConfig, num_processes: int) -> int:
    """Samples a forward pass of each process; the config's batch_size is that of a step over all of them."""
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
    """In words: how a step is shared, empty when there is nothing to say."""
    processes = parallel.num_processes()
    if processes == 1:
        return "parallelism: fsdp is for several processes, and this is one" if config.parallelism == "fsdp" else ""
    size = micro_batch_size(config, processes)
    passes = config.batch_size // (size * processes)
    held = "a shard of the frozen weights" if config.parallelism == "fsdp" else "the whole model"
    held += " and the whole teacher" if config.parallelism == "fsdp" and config.distill is not None else ""
    return f"{processes} processes, each with {held}: a step is {passes} forward passes of {size} samples in each"


def say_how(config: TuneConfig) -> None:
    """Tell the user how a step is shared."""
    text = describe(config)
    if text:
        console.info(f"  {text}")
