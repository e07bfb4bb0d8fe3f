"""Where the time goes: seconds a phase, each second counted once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """A clock for named phases; a phase that starts inside another one stops the other for that while.

    On a GPU the device is waited for at every change of phase, so that its work is counted where it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside as phase `name`."""
        self._change()
        self._open.append(name)
        try:
            yield
        finally:
            self._change()
            self._open.pop()

    def _change(self) -> None:
        """Book the time since the last change on the innermost phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def lap(self) -> dict[str, float]:
        """Seconds a phase since this was asked last."""
        lap = {name: seconds - self._told.get(name, 0.0) for name, seconds in self.seconds.items()}
        self._told = dict(self.seconds)
        return lap

    def add(self, earlier: dict[str, float]) -> None:
        """Count the seconds of an earlier run, too; they are in no lap."""
        for told in (self.seconds, self._told):
            told.update({name: told.get(name, 0.0) + seconds for name, seconds in earlier.items()})

    def rounded(self) -> dict[str, float]:
        """Seconds a phase, to the hundredth."""
        return {name: round(seconds, 2) for name, seconds in self.seconds.items()}

    def __str__(self) -> str:
        return " ".join(f"{name} {seconds:.0f}s" for name, seconds in self.seconds.items())
