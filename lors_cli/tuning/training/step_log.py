"""What a tuning run tells of its steps in `log.jsonl`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.errors import MissingError
from lors_cli.files import atomic
from lors_cli.output.console import counted


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
    """Whether a line's value is a row of the trainer's; what a step left out has no finite value of is null."""
    numbers = (int, float)
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    if not isinstance(value.get("tokens_per_s"), numbers) or "loss" not in value:
        return False
    return isinstance(value["loss"], numbers) or (value["loss"] is None and "skipped" in value)


def loss_text(metrics: dict[str, Any]) -> str:
    """`4.2104 → 3.9915 on 16 samples …`, of a stage's metrics."""
    kind = "that training did not see" if metrics["loss_held_out"] else "of the training data"
    samples = counted(metrics["loss_samples"], "sample")
    before = "not finite" if metrics["loss_before"] is None else f"{metrics['loss_before']:.4f}"
    return f"{before} → {metrics['loss_after']:.4f} on {samples} {kind}"


def step_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all steps of a run, for its record; the last loss is the mean of the last tenth."""
    good = [row for row in rows if "skipped" not in row]
    if not good:
        raise MissingError("the training log is empty: no optimiser step was made.")
    tail = good[-max(1, len(good) // 10) :]
    rates = sorted(row["tokens_per_s"] for row in rows)
    return {
        "steps": rows[-1]["step"],
        "bad_steps": len(rows) - len(good),
        "first_loss": round(good[0]["loss"], 6),
        "last_loss": round(sum(row["loss"] for row in tail) / len(tail), 6),
        "tokens_per_s": rates[len(rates) // 2],
    }
