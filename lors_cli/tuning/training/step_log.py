"""What a tuning run tells of its steps in `log.jsonl`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.files import atomic


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
