"""The tuning stage: `tune` recovers a sparse checkpoint with adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lors_cli.tuning.stage import tune as tune


def __getattr__(name: str) -> Any:
    """`tune`, once it is asked for: `lors bench` needs other modules of this room, and no pydantic."""
    if name != "tune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lors_cli.tuning.stage import tune

    return tune
