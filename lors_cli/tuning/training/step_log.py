"""What a tuning run tells of its steps: `log.jsonl` and the live line."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lors_cli.files import atomic

if TYPE_CHECKING:
    from lors_cli.output import progress
    from lors_cli.tuning.training.trainer import AdapterTrainer


@dataclass
class StepLog:
    """`log.jsonl`: a line an optimiser step."""

    path: Path

    def cut_after(self, step: int) -> None:
        """Forget steps after `step`, which an interrupted run did and this one does again."""
        kept = [line for line in self.rows() if line["step"] <= step]
        atomic.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # the last line of a killed run may be torn
                row = json.loads(line)
                if _is_row(row):
                    rows.append(row)
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Add a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _is_row(value: Any) -> bool:
    """Whether a line's value is one that `LogCallback` writes; what a step left out has no finite value of is null."""
    numbers = (int, float)
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    if not isinstance(value.get("tokens_per_s"), numbers) or "loss" not in value:
        return False
    return isinstance(value["loss"], numbers) or (value["loss"] is None and "skipped" in value)


class LogCallback(TrainerCallback):
    """Writes `log.jsonl` and shows loss and throughput live."""

    def __init__(self, log: StepLog, task: progress.Task, trainer: AdapterTrainer) -> None:
        self.log, self.task, self.trainer = log, task, trainer
        self._since = time.monotonic()
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """One optimiser step is done."""
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        rate = (self.trainer.tokens_seen - self._tokens) / max(now - self._since, 1e-9)
        self._since, self._tokens = now, self.trainer.tokens_seen
        guard = self.trainer.guard
        row = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs.get("learning_rate"),
               "grad_norm": float(logs["grad_norm"]), "tokens_per_s": round(rate, 1),
               "epoch": round(state.epoch or 0.0, 4)}  # fmt: skip
        if guard.reason:
            values = {"loss": guard.loss, "grad_norm": guard.norm}
            row |= {key: value if math.isfinite(value) else None for key, value in values.items()}
            row["skipped"] = guard.reason
        self.log.append(row)
        self.task.update(state.global_step, f"loss {guard.loss:.3f} · {rate:.0f} tokens/s")
