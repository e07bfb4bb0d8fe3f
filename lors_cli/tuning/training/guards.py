"""Bad optimiser steps: told from good ones, left out, counted, and too many of them the end of the run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from lors_cli.output import console

WINDOW = 50
"""Good steps that the medians are taken of."""
WARM_UP = 10
"""Good steps before which none is called a spike."""


class StepGuard:
    """Judges every optimiser step by its loss and its gradient's norm, before the update.

    Bad is a value that is not finite and, with `spike_factor`, a value above so many times its median over the last
    `WINDOW` good steps. `max_bad_steps` of the whole run are left out; one more ends it. `reason` is why the latest
    step was bad, None for a good one; `loss` and `norm` are its values.
    """

    def __init__(self, max_bad_steps: int = 0, spike_factor: float | None = None) -> None:
        self.max_bad_steps, self.spike_factor = max_bad_steps, spike_factor
        self.bad_steps = 0
        self.loss = self.norm = 0.0
        self.reason: str | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    @property
    def exceeded(self) -> bool:
        """Whether there were more bad steps than are allowed."""
        return self.bad_steps > self.max_bad_steps

    def is_bad(self, loss: float, norm: float) -> bool:
        """Judge a step by its loss and the norm of its gradient before clipping."""
        self.loss, self.norm = loss, norm
        self.reason = self._reason()
        if self.reason is not None:
            self.bad_steps += 1
        elif self.spike_factor is not None:
            self._losses.append(loss)
            self._norms.append(norm)
        return self.reason is not None

    def _reason(self) -> str | None:
        if not (math.isfinite(self.loss) and math.isfinite(self.norm)):
            return "the loss or its gradient is not finite"
        if self.spike_factor is None or len(self._losses) < WARM_UP:
            return None
        for name, value, seen in (("loss", self.loss, self._losses), ("gradient norm", self.norm, self._norms)):
            median = statistics.median(seen)
            if value > self.spike_factor * median:
                return f"the {name} is {value:.4g}, and its median over {len(seen)} steps {median:.4g}"
        return None

    def announce(self, step: int) -> None:
        """Say that the step just judged is left out."""
        console.warn(f"step {step} is left out ({self.bad_steps} of at most {self.max_bad_steps}): {self.reason}")

    def broken(self, step: int) -> str:
        """The message that ends the run."""
        counted = (
            f" It is bad step {self.bad_steps}, max_bad_steps is {self.max_bad_steps}." if self.bad_steps > 1 else ""
        )
        return f"training broke at step {step}: {self.reason}.{counted}"

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        return {"bad_steps": self.bad_steps, "losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state`."""
        self.bad_steps = state["bad_steps"]
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["norms"], maxlen=WINDOW)
