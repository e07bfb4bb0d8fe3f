"""The pruning stage: `prune` turns a dense checkpoint into a sparse one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lors_cli.pruning.stage import prune as prune


def __getattr__(name: str) -> Any:
    """`prune`, once it is asked for: this room's other modules need less than the stage does."""
    if name != "prune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lors_cli.pruning.stage import prune

    return prune
