"""`lors bench --decode`: text from a sparse model, dense and packed, on the same weights.

Both take turns in alternating order: in each round the model generates once with plain linears and once with packed
ones. Figures are medians over rounds, a ratio is taken within a round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.generation import BaseStreamer

from lors_cli.bench.measure import Figures, begun, environment_of, measured_model, rotated, spread
from lors_cli.bench.model import put_on_grids, sparse_model
from lors_cli.errors import UsageError
from lors_cli.files.atomic import write_json
from lors_cli.grid import Grid, GridSpec
from lors_cli.machine.devices import resolve_device
from lors_cli.models.blocks import model_max_length
from lors_cli.models.packed.format import pack, packed_bytes
from lors_cli.models.packed.kernels import ops
from lors_cli.models.packed.kernels.choice import why_none
from lors_cli.models.packed.linear import PackedLinear
from lors_cli.models.packed.measured import FILE_NAME
from lors_cli.models.packed.plan import PackPlan, plan_packing
from lors_cli.models.shapes import SHAPES
from lors_cli.output import console, progress
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning.grids import base_grids

ARMS = ("dense", "packed")
PROMPT = 16
"""Tokens that are read before those that are decoded."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What is measured.

    Args:
        shape: name of a model shape with random weights, half of them zero.
        model: a sparse checkpoint's folder instead, packed or not.
        pattern: of a shape's zeros.
        bits: of a shape's weights, 4 or 8, on symmetric grids; None for weights that lie on none.
        group_size: of these grids: inputs of a row that share a scale.
        blocks: only so many decoder blocks; None for all.
        lengths: tokens of prompts that are read.
        tokens: that are decoded, each after the one before it.
        batch_size: sequences at a time.
        rounds: times that dense and packed have their turn.
    """

    shape: str | None = "smollm2-135m"
    model: str | None = None
    pattern: Literal["2:4", "unstructured"] = "2:4"
    bits: int | None = None
    group_size: int = 128
    blocks: int | None = None
    lengths: tuple[int, ...] = (128, 512)
    tokens: int = 64
    batch_size: int = 1
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.model is None and self.shape not in SHAPES:
            raise UsageError(f"--shape: {self.shape} is none of {', '.join(SHAPES)}.")
        if self.pattern not in ("2:4", "unstructured"):
            raise UsageError(f"--pattern: must be 2:4 or unstructured, not {self.pattern}.")
        spec = None if self.bits is None else GridSpec(self.bits, self.group_size)
        if spec is not None and (wrong := ops.why_not_this_grid(spec)):
            raise UsageError(f"--bits: {wrong}; 4 or 8 it may be.")
        for name in ("blocks", "tokens", "batch_size", "rounds"):
            least = 2 if name == "tokens" else 1  # the first is of the prompt
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')}: must be at least {least}.")
        if any(length < 1 for length in self.lengths):
            raise UsageError("--lengths: a prompt has at least 1 token.")

    def cells(self) -> dict[str, tuple[int, int]]:
        """By name how many tokens a cell reads and how many it then writes; the first of them comes with reading."""
        decoding = {f"decode {self.tokens} tokens": (PROMPT, self.tokens)}
        return decoding | {f"prefill {length} tokens": (length, 1) for length in self.lengths}


def bench_decode(config: DecodeConfig, out: Path | None = None) -> Figures:
    """Measure decoding and reading of prompts with dense and with packed weights.

    Args:
        out: folder for bench.json, written after each cell; a second call goes on from there.

    Returns:
        The document of bench.json: settings, environment, sizes, and by cell and arm the figures.

    Raises:
        UsageError: the model is dense, cannot take the lengths, or the folder holds another benchmark.
    """
    document = begun(config, out)
    measure_missing(config, document, lambda: write_json(out / FILE_NAME, document) if out else None)
    return document


def measure_missing(config: DecodeConfig, document: Figures, keep: Callable[[], None]) -> None:
    """Fill a document's cells in, one by one.

    Args:
        keep: called after each cell.
    """
    missing = {name: cell for name, cell in config.cells().items() if name not in document["cells"]}
    if not missing:
        return
    device = resolve_device(config.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    model, linears = sparse_model(config.shape, config.model, config.blocks, dtype, device, config.pattern)
    model.eval()
    longest, needed = model_max_length(model), max(sum(cell) for cell in config.cells().values())
    if needed > longest:
        raise UsageError(f"{needed} tokens are more than the model's {longest}.", "Lower --lengths or --tokens.")
    grids = _grids(config, linears)
    plan = plan_packing(config.model or str(config.shape), linears, lambda name: linears[name].weight, grids=grids)
    reason = next(filter(None, (why_none(device, dtype, spec) for spec in _specs(plan, grids))), "")
    if reason:
        console.warn(f"packed weights are unpacked when they are loaded: {reason}. Both arms have dense linears.")
    arms: dict[str, dict[str, Any]] = {
        "dense": linears,
        "packed": {**linears, **({} if reason else _packed(linears, plan, grids))},
    }
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    document["environment"] = environment_of(device) | {
        "kernel": None if reason else _instructions(device), "why_no_kernel": reason,
        "clock": "processor time of the thread" if clock is time.thread_time else "wall clock",
    }  # fmt: skip
    document["model"] = measured_model(config)
    document["sizes"] = _sizes(model, plan, dtype, grids)
    with progress.progress("bench", config.rounds * len(ARMS) * len(missing), "turns") as task:
        for name, cell in missing.items():
            document["cells"][name] = _measure(config, cell, model, arms, clock, task)
            keep()


def _grids(config: DecodeConfig, linears: dict[str, nn.Linear]) -> dict[str, Grid]:
    """The grids that weights lie on, by name: those of a checkpoint, or new ones, to which a shape's are rounded."""
    if config.model is None:
        if config.bits is None:
            return {}
        return put_on_grids(linears, GridSpec(config.bits, config.group_size))
    grids = {name: grid for name, grid in base_grids(ModelConfig(path=config.model)).items() if name in linears}
    for grid in grids.values():
        if (name := str(grid.scales.dtype).removeprefix("torch.")) != config.dtype:
            raise UsageError(f"{config.model} lies on grids in {name}.", f"--dtype {name}")
    return grids


def _specs(plan: PackPlan, grids: dict[str, Grid]) -> set[GridSpec | None]:
    """The kinds of weights that are packed: grids, and None for values."""
    return {grids[name].spec if name in grids else None for name in plan.modules}


def _packed(linears: dict[str, nn.Linear], plan: PackPlan, grids: dict[str, Grid]) -> dict[str, nn.Module]:
    """The linears that `lors pack` would pack, packed."""
    return {name: PackedLinear.of(pack(linears[name].weight, plan.held, grids.get(name)), linears[name].bias)
            for name in plan.modules}  # fmt: skip


def _instructions(device: torch.device) -> str:
    return ops.instructions() if device.type == "cpu" else device.type


def _sizes(model: nn.Module, plan: PackPlan, dtype: torch.dtype, grids: dict[str, Grid]) -> Figures:
    """Bytes of the model's weights, and of those alone that are packed."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    plain = sum(rows * columns for rows, columns in plan.shapes.values()) * dtype.itemsize
    specs = {name: grid.spec for name, grid in grids.items()}
    packed = sum(packed_bytes(stored, *plan.shapes[name], dtype.itemsize, specs.get(name))
                 for name, stored in plan.modules.items())  # fmt: skip
    return {
        "pattern": plan.pattern, "bytes": {"dense": whole, "packed": whole - plain + packed},
        "packed_linears_bytes": {"dense": plain, "packed": packed}, "left_dense": plan.dense,
    }  # fmt: skip


class _Times(BaseStreamer):
    """When each token came out of `generate`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, list[float]()

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then each token; `generate` brings them to the CPU, which waits for the device."""
        self.at.append(self.clock())

    def end(self) -> None:
        """Nothing is left to do."""


def _measure(
    config: DecodeConfig, cell: tuple[int, int], model: Any, arms: dict[str, dict[str, Any]],
    clock: Callable[[], float], task: progress.Task,
) -> Figures:  # fmt: skip
    """Both arms at one cell."""
    length, tokens = cell
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (config.batch_size, length), generator=generator).to(model.device)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(-1, config.rounds):  # the first round warms up
        for name in rotated(ARMS, number + 1):
            for place, linear in arms[name].items():
                model.set_submodule(place, linear)
            read, written = _generate(model, prompt, tokens if number >= 0 else min(tokens, 2), clock)
            if number >= 0:
                seconds[name].append(read if tokens == 1 else written / (tokens - 1))
                task.advance()
    each = config.batch_size * (length if tokens == 1 else 1)
    figures: Figures = {name: {"tokens_per_s": spread([each / taken for taken in found]),
                               "ms": spread([1000 * taken for taken in found])}
                        for name, found in seconds.items()}  # fmt: skip
    pairs = zip(seconds["dense"], seconds["packed"], strict=True)
    return {**figures, "dense_over_packed": spread([dense / packed for dense, packed in pairs]),
            "load_average": round(os.getloadavg()[0], 2)}  # fmt: skip


def _generate(model: Any, prompt: torch.Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    times = _Times(clock)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        num_beams=1, pad_token_id=0, streamer=times,
    )  # fmt: skip
    started, first, *_ = times.at
    return first - started, times.at[-1] - first
