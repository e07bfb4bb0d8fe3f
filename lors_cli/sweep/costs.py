"""What stages will take: floating-point operations by arithmetic, hours by a rate, disk for all of them.

Hours are an estimate and say what they rest on: stages like finished ones go at the pace of those, the others at a
share of what a matrix product reaches on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.files import records
from lors_cli.machine.devices import resolve_device
from lors_cli.models.size import try_size
from lors_cli.pipeline.plans import StagePlan
from lors_cli.pipeline.stages import STAGES
from lors_cli.recipe.schema import ModelConfig

EFFICIENCY = {"cuda": 0.4, "cpu": 0.25, "mps": 0.25}
"""Share of a matrix product's speed that whole stages reach."""


@dataclass(frozen=True)
class Cost:
    """What a stage needs, memory and disk in bytes at their peak; None where the model's or data's size is unknown."""

    operations: float | None
    seconds: float | None
    memory: int | None
    disk: int | None


def costs(plans: Sequence[StagePlan], data_dirs: Mapping[Path, Path | None], tflops: float | None = None) -> list[Cost]:
    """What each stage needs, seconds for those that are not finished; `data_dirs` is by stage folder.

    Args:
        plans: of all stages of a sweep, finished ones among them.
        tflops: 10¹² operations a second, where nothing like a stage is finished; None: `device_rate`.
    """
    work = {plan.folder: operations(plan, data_dirs[plan.folder]) for plan in plans}
    rates: dict[Any, float] = {}
    for plan in plans:
        record = records.read_record(plan.folder) if plan.status == "done" else None
        amount = work[plan.folder]
        if record is None or not amount or record.elapsed_s <= 0:
            continue
        for kind in _kinds(plan):  # the slowest: a stage that was resumed has recorded the time of its last call
            rates[kind] = min(amount / record.elapsed_s, rates.get(kind, math.inf))
    found = []
    for plan in plans:
        rate = next((rates[kind] for kind in _kinds(plan) if kind in rates), None)
        amount = work[plan.folder]
        if plan.status != "done" and amount is not None and rate is None:
            rate = tflops * 1e12 if tflops else device_rate(plan.origin)
        seconds = 0.0 if plan.status == "done" else amount / rate if amount is not None and rate else None
        found.append(Cost(amount, seconds, *_space(plan)[:2]))
    return found


def assumption(plans: Sequence[StagePlan], tflops: float | None = None) -> str:
    """What the seconds of `costs` rest on, in one sentence."""
    origin = plans[0].origin
    if tflops:
        words = f"{tflops:g} TFLOP/s, as given"
    elif try_size(origin) is None:
        return "the model's size is not known until its config.json is downloaded"
    else:
        share = f"{_share(origin):.0%} of a matrix product's on {_device(origin)}"
        words = f"{device_rate(origin) / 1e12:.2g} TFLOP/s, {share}"
    if any(plan.status == "done" for plan in plans):
        return f"an estimate, by the pace of finished stages where there are like ones, else {words}"
    return f"an estimate, by the number of operations at {words}"


def _kinds(plan: StagePlan) -> list[Any]:
    """What a stage is like, from the nearest to the farthest."""
    size = try_size(plan.origin)
    shape = (plan.stage, size.num_parameters if size else plan.origin.path)
    method = getattr(plan.config, "method", None)
    return [shape] if method is None else [(*shape, method), shape]


def disk_needed(plans: Sequence[StagePlan]) -> int | None:
    """Bytes of disk for all that is to run: what every stage (each given once) leaves, and what the largest holds
    meanwhile; None where a model's size is not known."""
    kept, working = 0, 0
    for plan in plans:
        _, disk, left = _space(plan)
        if plan.status == "done":
            continue
        if disk is None or left is None:
            return None
        kept, working = kept + left, max(working, disk - left)
    return kept + working


def _space(plan: StagePlan) -> tuple[int | None, int | None, int | None]:
    """Peak memory, disk while it runs, and what it leaves there."""
    size = try_size(plan.origin)
    if size is None:
        return None, None, None
    doors = STAGES[plan.stage]
    needs = doors.needs(plan.config, size, plan.num_processes)
    return needs.memory, needs.disk, doors.leaves(plan.config, size)


# Operations -----------------------------------------------------------------------------------------------------


def operations(plan: StagePlan, data_dir: Path | None) -> float | None:
    """Floating-point operations of a stage, multiplications and additions counted; None where a size is not known."""
    size = try_size(plan.origin)
    if size is None:
        return None
    return STAGES[plan.stage].operations(plan.config, size, len(plan.models), data_dir)


# The device -----------------------------------------------------------------------------------------------------


_rates: dict[tuple[str, Any, tuple[int, int, int]], float] = {}


def device_rate(model: ModelConfig) -> float:
    """Operations a second of whole stages: a share of what a matrix product of the model's shape reaches, measured
    once."""
    import torch

    device = resolve_device(model.device)
    size = try_size(model)
    assert size is not None
    dtype = torch.bfloat16 if size.bytes_a_weight == 2 else torch.float32
    shape = (4096 if device.type == "cuda" else 512, size.hidden_size, size.intermediate_size)
    key = (str(device), dtype, shape)
    if key not in _rates:
        rows, inner, columns = shape
        left = torch.ones(rows, inner, dtype=dtype, device=device)
        right = torch.ones(columns, inner, dtype=dtype, device=device)
        _rates[key] = 2.0 * rows * inner * columns / min(_timed_product(left, right) for _ in range(5))
    return _share(model) * _rates[key]


def _share(model: ModelConfig) -> float:
    return EFFICIENCY[resolve_device(model.device).type]


def _timed_product(left: Any, right: Any) -> float:
    import torch

    started = time.perf_counter()
    product = left @ right.T
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    product[0, 0].item()
    return time.perf_counter() - started


def _device(model: ModelConfig) -> str:
    import torch

    device = resolve_device(model.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"this {device.type} with {threads} thread{'s' if threads > 1 else ''}"
