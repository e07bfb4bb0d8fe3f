"""Step 2: time and memory of a training step of Llama-3-8B's shape, all methods on one set of random 2:4 weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu.box import Box, Figures

from lors_cli.bench.model import ARMS, adapted, checkpoint_blocks, memory_of_step, sparse_model, tidy
from lors_cli.models import shapes
from lors_cli.models.shapes import SHAPES, Shape
from lors_cli.tuning.head import causal_lm_loss


@dataclass(frozen=True)
class Cell:
    """One setting, and the methods that are compared there, in order of worth.

    LoRA's own adapters have the weights' dtype, which is faster; its peak counts with float32 ones, as LoRS's are.
    """

    tokens: int
    rank: int
    checkpointing: bool
    methods: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.tokens} tokens, rank {self.rank}{', block checkpointing' if self.checkpointing else ''}"


ALL = ("lora", "lors", "lors-cached", "lora-float32", "spp-gc", "sqft", "lors-nearest", "hira", "lors-exact", "hira-gc",
       "lors-packed")  # fmt: skip
MAIN = ("lora", "lors", "lors-cached", "spp-gc", "sqft")
CELLS = (
    Cell(2048, 16, False, ALL),
    Cell(2048, 16, True, MAIN),
    Cell(512, 16, False, MAIN),
    Cell(1024, 16, False, MAIN),
    Cell(2048, 64, False, ("lora", "lors", "lors-cached")),
)
TINY = Shape((), 64, 128, 2, 4, 2, 300, 64)
TINY_CELLS = (Cell(16, 16, False, ALL), Cell(16, 4, True, ("lora", "lors")))
ROUNDS = 2
"""Of every method in a cell, in turns, so that drift shows."""


def step_of(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A whole training step."""

    def step() -> None:
        causal_lm_loss(model, {"input_ids": ids, "labels": ids}).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    """Of each step, by the host's clock: what a user waits for."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return taken


def measured(model: Any, linears: Any, cell: Cell, method: str, repeats: int) -> Figures:
    """A method's step: two that do not count (memory is laid out, kernels compiled), the timed ones, its memory."""
    ids = torch.randint(model.config.vocab_size, (1, cell.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    with adapted(model, linears, ARMS[method], cell.rank) as optimizer:
        step = step_of(model, ids, optimizer)
        seconds(step, model.device, 2)
        taken = seconds(step, model.device, repeats)
        memory = memory_of_step(model, optimizer, [ids], step)
    tidy(model.device)
    return {"step_s": statistics.median(taken), "all_s": [round(value, 5) for value in taken],
            "tokens_per_s": cell.tokens / statistics.median(taken),
            **{f"{name.removesuffix('_bytes')}_gib": value / 2**30 for name, value in memory.items()}}  # fmt: skip


def run(box: Box) -> None:
    """All cells; the second round of one before the next."""
    shape, cells, rounds, repeats = ("llama3-8b", CELLS, ROUNDS, 5) if not box.rehearse else ("tiny", TINY_CELLS, 1, 1)
    shapes.SHAPES.setdefault("tiny", TINY)
    assert shape in SHAPES
    started = time.monotonic()
    model, linears = sparse_model(shape, None, None, torch.bfloat16, box.device)
    model.train()
    box.items["model"] = {"shape": shape, "made_s": round(time.monotonic() - started, 1)}
    for cell in cells:
        checkpoint_blocks(model, cell.checkpointing)
        for number in range(rounds):
            for method in cell.methods[number:] + cell.methods[:number]:
                name = f"{cell} · {method} · round {number + 1}"
                needs = 0.1 if box.rehearse else 30.0 if method == "lors-packed" else 10.0  # it moves the plain weights
                needs = box.items.get(f"{cell} · {method} · round 1", {}).get("item_s", needs)
                box.item(name, lambda method=method, cell=cell: measured(model, linears, cell, method, repeats), needs)  # type: ignore[misc]
                box.items["compared"] = compared(box.items, cells)
                box.write()


def compared(items: dict[str, Figures], cells: tuple[Cell, ...] = CELLS) -> Figures:
    """By cell and method the median of its rounds, and its step over LoRA's."""
    table: Figures = {}
    for cell in cells:
        for method in cell.methods:
            rounds = [items.get(f"{cell} · {method} · round {number + 1}", {}) for number in range(ROUNDS)]
            rounds = [figures for figures in rounds if "step_s" in figures]
            if rounds:
                row = table.setdefault(str(cell), {}).setdefault(method, {})
                row["step_s"] = statistics.median(figures["step_s"] for figures in rounds)
                row["peak_gib"] = max(figures["peak_gib"] for figures in rounds)
                row["saved_gib"] = max(figures["saved_gib"] for figures in rounds)
        rows = table.get(str(cell), {})
        for row in rows.values():
            if "lora" in rows:
                row["over_lora"] = row["step_s"] / rows["lora"]["step_s"]
    return table
