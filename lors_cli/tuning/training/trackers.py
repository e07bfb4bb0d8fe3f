"""Where the numbers of each step go besides `log.jsonl`.

A tracker is a function that takes a row of the log. To add one: a context manager that makes it, a line in `tracking`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lors_cli.machine import processes
from lors_cli.recipe.schema import TuneConfig

Tracker = Callable[[dict[str, Any]], None]


@contextmanager
def tracking(config: TuneConfig, folder: Path) -> Iterator[list[Tracker]]:
    """The trackers that are asked for, for as long as a run lasts; what they write is below the stage's folder."""
    with ExitStack() as opened:
        trackers = []
        if config.tensorboard and processes.is_main():
            trackers.append(opened.enter_context(_tensorboard(folder / "tensorboard")))
        yield trackers


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Tracker]:
    """Scalars in TensorBoard's event files."""
    from torch.utils.tensorboard import SummaryWriter

    def add(row: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            if row[name] is not None:
                writer.add_scalar(f"train/{name}", row[name], row["step"])
        writer.flush()

    with SummaryWriter(folder) as writer:
        yield add
