"""What the benchmarks of this folder share: clocks, the floor, order of arms, medians, masks."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lors_cli.bench.measure import spread
from lors_cli.models.blocks import decoder_blocks
from lors_cli.pruning.walk.calibration import capture

OUTSIDE_PRUNING = ("inputs", "load", "save", "io", "io/save")
"""Phases that not every arm has, or that is no pruning: left out of `pruning_s`."""


@dataclass
class PhaseTimer:
    """Seconds spent in named phases; a phase inside another one stops the outer's clock.

    Args:
        device: waited for at every change of phase.
        seconds: by phase.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to `name`."""
        self._lap()
        self._open.append(name)
        yield
        self._lap()
        self._open.pop()

    def _lap(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@torch.no_grad()
def forward_floor(model: Any, batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Two bare forward passes of every decoder block: what a block-by-block pruner cannot do without.

    Args:
        model: causal LM, left as it is.
        batches: tokens (samples, tokens) each.

    Returns:
        Seconds a phase: `inputs` (of the first block), `forward`.
    """
    _, blocks = decoder_blocks(model)
    timer = PhaseTimer(model.device)
    with timer.phase("inputs"):
        hidden, arguments = capture(model, list(blocks), batches)
    with timer.phase("forward"):
        for block, own_arguments in zip(blocks, arguments, strict=True):
            for index, batch in enumerate(hidden):
                own_arguments.run(block, batch, index)
            for index, batch in enumerate(hidden):
                hidden[index] = own_arguments.run(block, batch, index)
    return timer.seconds


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """A decoder block's linears by their names in the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def first_block_masks(model: Any) -> dict[str, torch.Tensor]:
    """Where the weights of the first block's linears are not zero, on the CPU."""
    _, blocks = decoder_blocks(model)
    return {name: (linear.weight != 0).cpu() for name, linear in linears_of(blocks[0]).items()}


def equal_share(some: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Share of equal mask entries by linear."""
    return {name: round(float((mask == other[name]).double().mean()), 6) for name, mask in some.items()}


def pruning_seconds(phases: Mapping[str, float]) -> float:
    """Seconds in the phases that every arm is compared by."""
    return sum(seconds for name, seconds in phases.items() if name not in OUTSIDE_PRUNING)


def ratios(rounds: Sequence[Mapping[str, Mapping[str, Any]]], over: str, under: str, key: str) -> dict[str, float]:
    """The spread of the quotient of two arms, taken round by round.

    Args:
        rounds: results by arm.
        over: an arm.
        under: the arm it is divided by.
        key: of the figure.
    """
    return spread([arms[over][key] / arms[under][key] for arms in rounds])


def software() -> dict[str, str]:
    """System, processor architecture and versions; no machine's name."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def cell(figures: Mapping[str, float], digits: int = 1) -> str:
    """`spread` for a table: the median, and the range in brackets."""
    return f"{figures['median']:.{digits}f} ({figures['min']:.{digits}f}–{figures['max']:.{digits}f})"


def screen_of() -> Console:
    """The terminal; wide lines where there is none."""
    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen.width = 200
    return screen
