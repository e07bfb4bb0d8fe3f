"""`lors bench`: time and memory of a training step with every tuning method, on one set of sparse weights.

The arms take turns on the same frozen weights: in each round every method is put on, warmed up, timed and taken off,
in an order that rotates from round to round. Figures are medians over rounds, ratios are taken within a round.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lors_cli import __version__
from lors_cli.bench.model import ARMS, adapted, checkpoint_blocks, memory_of_step, put_on_grids, sparse_model, tidy
from lors_cli.errors import MissingError, UsageError
from lors_cli.files.atomic import write_json
from lors_cli.grid import Grid
from lors_cli.machine.devices import processor, resolve_device
from lors_cli.models.blocks import model_max_length
from lors_cli.models.packed.measured import FILE_NAME
from lors_cli.models.shapes import SHAPES
from lors_cli.models.sources import model_fingerprint
from lors_cli.output import console, progress
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning.baselines import check_rank
from lors_cli.tuning.head import causal_lm_loss
from lors_cli.tuning.kernels.masked_merge import how_merged
from lors_cli.tuning.lors import QUARTER, choose_gradients

AUTHORS_LOG = {"lora": (1.13, 26.0), "lors": (1.28, 26.0), "sqft": (1.26, 44.2), "spp-gc": (2.20, 25.8)}
"""Seconds an iteration and GiB in the LoRS authors' own log (A6000), for comparison."""
ASKED_FOR = ("lora-float32", "lors-rotating", "lors-nearest", "lors-packed", "lors-int4", "lors-qa", "sqft-qa")
"""Methods that are measured only when they are named."""

Figures = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Args:
        shape: name of a model shape with random 2:4 weights.
        model: a checkpoint's folder instead.
        blocks: only so many decoder blocks; None for all.
        methods: of `ARMS`.
        lengths: tokens a sequence.
        batch_size: sequences a micro-batch.
        accumulation: micro-batches a step.
        checkpointing: whether decoder blocks are computed again in backward; one or both.
        rounds: times that every method has its turn.
        steps: timed steps a turn, after one that is not; with rotating gradients so many times four.
    """

    shape: str | None = "smollm2-135m"
    model: str | None = None
    blocks: int | None = None
    methods: tuple[str, ...] = tuple(name for name in ARMS if name not in ASKED_FOR)
    lengths: tuple[int, ...] = (512, 1024, 2048)
    ranks: tuple[int, ...] = (16, 32, 64)
    batch_size: int = 1
    accumulation: int = 1
    checkpointing: tuple[bool, ...] = (False,)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"
    rounds: int = 5
    steps: int = 3

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in ARMS]
        if unknown:
            raise UsageError(f"--methods: {unknown[0]} is none of {', '.join(ARMS)}.")
        if self.model is None and self.shape not in SHAPES:
            raise UsageError(f"--shape: {self.shape} is none of {', '.join(SHAPES)}.")
        for name in ("methods", "lengths", "ranks", "checkpointing"):
            if not getattr(self, name):
                raise UsageError(f"--{name}: nothing is given.")
        for name in ("blocks", "batch_size", "accumulation", "rounds", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')}: must be at least 1.")
        if min(self.lengths) < 2 or min(self.ranks) < 1:
            raise UsageError("a sequence has at least 2 tokens, and a rank is at least 1.")


@dataclass(frozen=True)
class Cell:
    """One setting that all methods are compared at."""

    length: int
    rank: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.length} tokens, rank {self.rank}{', block checkpointing' if self.checkpointing else ''}"


def bench(config: BenchConfig, out: Path | None = None) -> Figures:
    """Measure every method at every length and rank.

    Args:
        out: folder for bench.json, written after each cell; a second call resumes.

    Returns:
        The document of bench.json: settings, environment, and by cell and method the figures.

    Raises:
        UsageError: a rank or length that the model cannot take, or a folder that holds another benchmark.
    """
    document = begun(config, out)
    settings = product(config.checkpointing, config.lengths, config.ranks)
    cells = [Cell(length, rank, checkpointing) for checkpointing, length, rank in settings]
    missing = [cell for cell in cells if str(cell) not in document["cells"]]
    if not missing:
        return document
    config = replace(config, methods=_installed(tuple(dict.fromkeys(config.methods))))
    model, linears = sparse_model(
        config.shape, config.model, config.blocks, getattr(torch, config.dtype), resolve_device(config.device)
    )
    grids = put_on_grids(linears) if any(ARMS[name].int4 for name in config.methods) else {}
    longest = model_max_length(model)
    if max(config.lengths) > longest:
        raise UsageError(f"--lengths: {max(config.lengths)} is above the model's {longest} tokens.")
    fitting = {rank: _fitting(config.methods, rank, linears) for rank in config.ranks}
    merge = how_merged(model.device, model.dtype, "stochastic")
    document["environment"] = {**environment_of(model.device), "merge": merge}
    document["model"] = measured_model(config)
    turns = config.rounds * sum(len(fitting[cell.rank]) for cell in missing)
    with progress.progress("bench", turns, "turns") as task:
        for cell in missing:
            chosen = replace(config, methods=fitting[cell.rank])
            document["cells"][str(cell)] = _measure(chosen, cell, model, linears, grids, task)
            if out is not None:
                write_json(out / FILE_NAME, document)
    return document


def _fitting(methods: tuple[str, ...], rank: int, linears: dict[str, nn.Linear]) -> tuple[str, ...]:
    """The methods that can take a rank; the others are left out with a word.

    Raises:
        UsageError: none can.
    """
    found: list[str] = []
    for name in methods:
        try:
            check_rank(ARMS[name].method, rank, (linear.out_features for linear in linears.values()))
        except UsageError as error:
            if not found and name == methods[-1]:
                raise
            console.warn(f"no row for {name} at rank {rank}: {error.message}")
        else:
            found.append(name)
    return tuple(found)


def begun(config: Any, out: Path | None) -> Figures:
    """The document of bench.json as far as it was measured with these settings, a dataclass.

    Raises:
        UsageError: the folder holds a benchmark with others, of another machine, or of what the model was before.
    """
    settings = json.loads(json.dumps(asdict(config)))
    path = out / FILE_NAME if out else None
    if path is None or not path.is_file():
        return {"settings": settings, "environment": {}, "cells": {}}
    found: Figures = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise UsageError(f"{path} holds a benchmark with other settings.", "Name another folder with --out.")
    here = environment_of(resolve_device(config.device))
    is_elsewhere = any(found["environment"].get(key, value) != value for key, value in here.items())
    if found["cells"] and (is_elsewhere or found.get("model") != measured_model(config)):
        raise UsageError(
            f"{path} holds figures of another machine, of other packages, or of what the model was before.",
            "Name another folder with --out.",
        )
    return found


def measured_model(config: Any) -> str | None:
    """The fingerprint of a checkpoint that is measured."""
    return None if config.model is None else model_fingerprint(ModelConfig(path=config.model))


def _installed(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods without those whose package is not there."""
    try:
        import peft  # noqa: F401
    except ImportError:
        left = tuple(name for name in methods if ARMS[name].method != "lora")
        if not left:
            raise MissingError("LoRA is measured with the package peft.", "pip install peft") from None
        if left != methods:
            console.warn("the package peft is not installed: no row for LoRA (pip install peft).")
        return left
    return methods


def _measure(
    config: BenchConfig, cell: Cell, model: Any, linears: dict[str, nn.Linear], grids: dict[str, Grid],
    task: progress.Task,
) -> dict[str, Figures]:  # fmt: skip
    """All methods at one cell."""
    checkpoint_blocks(model, cell.checkpointing)
    model.train()
    generator = torch.Generator().manual_seed(cell.length)
    shape = (config.accumulation, config.batch_size, cell.length)
    batches = list(
        torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(model.device)
    )
    seconds: dict[str, list[float]] = {name: [] for name in config.methods}
    memory: dict[str, Figures] = {}
    for number in range(config.rounds):
        for name in rotated(config.methods, number):
            if "failed" not in memory.get(name, {}):
                try:
                    with adapted(model, linears, ARMS[name], cell.rank, grids) as optimizer:
                        rotating = ARMS[name].gradient == "rotating"
                        step = partial(_step, model, batches, optimizer, count() if rotating else None)
                        step()
                        turn = QUARTER if rotating else 1  # steps in which every layer has been exact
                        seconds[name].append(_median_seconds(step, config.steps, turn, model.device))
                        if name not in memory:
                            memory[name] = memory_of_step(model, optimizer, batches, step)
                except torch.OutOfMemoryError:
                    memory[name] = {"failed": "out of memory"}
                    seconds[name] = []
                tidy(model.device)
            task.advance(1, f"{cell} · {name}")
    return {name: {**memory[name], **_summary(name, seconds, shape)} for name in config.methods}


def _step(
    model: Any, batches: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, rotating: Iterator[int] | None
) -> None:
    """One step, the next of `rotating` gradients."""
    if rotating is not None:
        choose_gradients(model, "rotating", next(rotating))
    for ids in batches:
        causal_lm_loss(model, {"input_ids": ids, "labels": ids}).div(len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _median_seconds(step: Callable[[], None], number: int, turn: int, device: torch.device) -> float:
    """Of a step, the median of so many means of `turn` steps each."""
    taken = []
    for _ in range(number * turn):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(statistics.mean(taken[first : first + turn]) for first in range(0, len(taken), turn))


def _summary(name: str, seconds: dict[str, list[float]], shape: tuple[int, ...]) -> Figures:
    """Speed of a method, and its step time over LoRA's and LoRS's, round by round."""
    mine = seconds[name]
    if not mine:
        return {}
    tokens = shape[0] * shape[1] * shape[2]
    summary: Figures = {"tokens_per_s": spread([tokens / value for value in mine]), "step_s": spread(mine)}
    for other in ("lora", "lors"):
        if seconds.get(other):
            pairs = zip(mine, seconds[other], strict=True)
            summary[f"step_over_{other}"] = spread([value / reference for value, reference in pairs])
    return summary


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """The items with the first `by` moved to the end, round and round."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, in six digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def environment_of(device: torch.device) -> Figures:
    """What figures depend on, but for the settings."""
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lors": __version__,
    }  # fmt: skip
