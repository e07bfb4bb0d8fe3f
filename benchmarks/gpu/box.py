"""A step's time and its file of results."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lors_cli.files import atomic

Figures = dict[str, Any]


@dataclass
class Box:
    """Items measured one after the other, each guarded, the file written after every one.

    Args:
        path: of the file.
        ends: by `time.monotonic`; no item begins that would need more.
        rehearse: tiny shapes on the CPU.
        cpu: real ones there, for figures to compare with.
    """

    path: Path
    ends: float
    rehearse: bool = False
    cpu: bool = False
    items: dict[str, Figures] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device("cpu" if self.rehearse or self.cpu else "cuda")

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def item(self, name: str, measure: Callable[[], Figures], needs_s: float = 1.0) -> Figures | None:
        """Its figures; None where it failed, or says so itself, or had no time, and the file says why."""
        if self.left() < needs_s:
            self.items[name] = {"left_out": f"{max(0.0, self.left()):.0f} s were left of about {needs_s:.0f}"}
        else:
            started = time.monotonic()
            try:
                figures = measure()
            except Exception as error:
                traceback.print_exc()
                figures = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            self.items[name] = {**figures, "item_s": round(time.monotonic() - started, 2)}
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.write()
        found = self.items[name]
        return None if "failed" in found or "left_out" in found else found

    def write(self) -> None:
        """The file as it is now."""
        atomic.write_json(self.path, self.items)


def seconds_of(run: Callable[[int], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, which gets its number; on a GPU between events, after three calls that do not count."""
    if device.type != "cuda":
        taken = []
        for number in range(repeats):
            started = time.perf_counter()
            run(number)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)
    for number in range(3):
        run(number)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for number, (before, after) in enumerate(pairs):
        before.record()
        run(number)
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1000


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call that replays on a GPU, as one graph, what `run` has it do; elsewhere `run` itself."""
    if device.type != "cuda":
        return run
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # what is made at first use is made before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
