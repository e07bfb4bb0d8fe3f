"""Results of three models on two tasks and a text, as `eval/*.json` holds them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lors_cli.evaluation.summary import average


def scored(acc: float | None, norm: float, boolq: float, perplexity: float | None) -> dict[str, Any]:
    tasks: dict[str, dict[str, Any]] = {
        "arc_easy": {"acc": acc, "acc_stderr": 0.0123, "acc_norm": norm, "acc_norm_stderr": None, "num_samples": 9},
        "boolq": {"acc": boolq, "acc_stderr": 0.02, "num_samples": 9},
    }
    text = {"value": perplexity, "tokens": 10, "sequence_length": 5}
    return {"model": "m", "tasks": tasks, "average": average(tasks), "perplexity": {"wikitext2": text}}


@pytest.fixture
def trio() -> dict[str, Any]:
    return {
        "dense": scored(0.6, 0.5, 0.8, math.e**2),
        "pruned": scored(0.4, 0.3, 0.6, math.e**3),
        "tuned": scored(0.55, 0.45, 0.75, math.e**2.25),
    }
