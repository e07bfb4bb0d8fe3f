"""What a stage needs of memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from lors_cli.output.console import gib

RUNTIME = 1 << 29
"""Bytes that Python and the libraries take whatever the model."""
RECORDS = 16 << 20
"""Bytes of all that lies beside the weights: tokenizer, records, logs."""


@dataclass(frozen=True)
class Estimate:
    """Bytes a stage needs, good to about a fifth: peak memory while it runs, and disk (with its resumable state)."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {gib(self.memory)} of memory, {gib(self.disk)} of disk"
