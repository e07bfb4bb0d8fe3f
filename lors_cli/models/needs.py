"""What a stage needs of memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from lors_cli.output.console import gib


@dataclass(frozen=True)
class Estimate:
    """Bytes a stage needs: peak memory while it runs, and disk (with its resumable state)."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {gib(self.memory)} of memory, {gib(self.disk)} of disk"
