"""Pruning that is killed between two blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lors_cli.pruning.stage import prune
from lors_cli.pruning.walk.hidden_states import HiddenStates
from lors_cli.recipe.schema import ModelConfig, PruneConfig


class Killed(BaseException):
    """Stands for SIGKILL."""


def killed_when(when: Callable[[int, int], bool], config: PruneConfig, model: ModelConfig, out: Path) -> None:
    """Prune until the inputs of some block are made and on disk.

    Args:
        when: of the block's number and of how often inputs were made so far, this time included.
    """
    advance, calls = HiddenStates.advance, 0

    def killed(self: HiddenStates, *args: Any) -> None:
        nonlocal calls
        advance(self, *args)
        calls += 1
        if when(self._index, calls):
            self.settle()
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HiddenStates, "advance", killed)
        with pytest.raises(Killed):
            prune(config, model, out)
