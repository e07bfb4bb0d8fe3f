"""Averages and recovered shares, with numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from scored_models import scored

from lors_cli.evaluation.summary import average, average_stderr, recovered


def test_recovered_shares(trio: dict[str, Any]) -> None:
    # Averages 0.70, 0.50, 0.65: 0.15 of 0.20. Log-perplexities 2, 3, 2.25: 0.75 of 1.
    assert recovered(trio) == pytest.approx({"accuracy": 0.75, "perplexity wikitext2": 0.75})
    assert recovered({label: trio[label] for label in ("dense", "tuned")}) == {}


def test_nothing_is_recovered_where_nothing_was_lost(trio: dict[str, Any]) -> None:
    trio["pruned"] = scored(0.7, 0.5, 0.9, None)
    assert recovered(trio) == {}


def test_the_averages_standard_error() -> None:
    def of(tasks: dict[str, Any]) -> float | None:
        return average_stderr({"tasks": tasks, "average": average(tasks)})

    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc": 0.1, "acc_stderr": 0.04}, "c": {"bleu": 3.0}}
    assert of(tasks) == pytest.approx(0.05 / 2)
    assert of({**tasks, "d": {"acc": 0.2, "acc_stderr": None}}) is None
    assert of({"c": {"bleu": 3.0}}) is None


@pytest.mark.parametrize(("lost", "expected"), [(0.0117, None), (0.0119, 2.0), (-0.1, "absent")])
def test_no_share_of_a_loss_inside_its_own_error(trio: dict[str, Any], lost: float, expected: Any) -> None:
    """Dense BoolQ below chance once gave “Recovered 600 %”: of a loss that the scores cannot tell from none."""
    # Of each average √(0.0123² + 0.02²)/2 = 0.01174, so of their difference √2 times that, 0.0166: here of one task
    # with 0.0084 each, √2 · 0.0084 = 0.0118797.
    for label, acc in (("dense", 0.5), ("pruned", 0.5 - lost), ("tuned", 0.5 + lost)):
        trio[label]["tasks"] = {"boolq": {"acc": acc, "acc_stderr": 0.0084, "num_samples": 9}}
        trio[label]["average"] = average(trio[label]["tasks"])
    found = recovered(trio).get("accuracy", "absent")
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_a_loss_whose_error_is_not_known_has_a_share(trio: dict[str, Any]) -> None:
    for content in trio.values():
        del content["tasks"]
    assert recovered(trio)["accuracy"] == pytest.approx(0.75)
