"""Fixtures that the tests of scoring share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lors_cli.evaluation.prefix_tree import Choice
from lors_cli.output import console


@pytest.fixture
def questions() -> Callable[..., list[Choice]]:
    """Makes questions of random tokens below 300."""

    def make(seed: int = 0, contexts: int = 10, longest: int = 60) -> list[Choice]:
        """Questions with four choices each; some choices are equal, one is the start of another."""
        draw = random.Random(seed)

        def tokens(most: int) -> list[int]:
            return [draw.randrange(3, 300) for _ in range(draw.randint(1, most))]

        choices = []
        for document in range(contexts):
            context, endings = [1, *tokens(longest)], [tokens(12) for _ in range(4)]
            endings[1] = [*endings[0], 7] if document % 3 == 0 else endings[1]
            endings[3] = endings[2] if document % 4 == 0 else endings[3]
            choices += [Choice([*context, *ending][:-1], ending, document) for ending in endings]
        return choices

    return make


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    monkeypatch.setattr(console, "info", lines.append)
    return lines


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_dir / "data" / "models" / "stories260k"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
