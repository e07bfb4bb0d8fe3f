"""The comparison table and the recovered shares, with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lors_cli.evaluation.summary import average, average_stderr, recovered, summary_table


def _result(acc: float | None, norm: float, boolq: float, perplexity: float | None) -> dict[str, Any]:
    tasks: dict[str, dict[str, Any]] = {
        "arc_easy": {"acc": acc, "acc_stderr": 0.0123, "acc_norm": norm, "acc_norm_stderr": None, "num_samples": 9},
        "boolq": {"acc": boolq, "acc_stderr": 0.02, "num_samples": 9},
    }
    text = {"value": perplexity, "tokens": 10, "sequence_length": 5}
    return {"model": "m", "tasks": tasks, "average": average(tasks), "perplexity": {"wikitext2": text}}


@pytest.fixture
def trio() -> dict[str, Any]:
    return {
        "dense": _result(0.6, 0.5, 0.8, math.e**2),
        "pruned": _result(0.4, 0.3, 0.6, math.e**3),
        "tuned": _result(0.55, 0.45, 0.75, math.e**2.25),
    }


def test_recovered_shares(trio: dict[str, Any]) -> None:
    # Averages 0.70, 0.50, 0.65: 0.15 of 0.20. Log-perplexities 2, 3, 2.25: 0.75 of 1.
    assert recovered(trio) == pytest.approx({"accuracy": 0.75, "perplexity wikitext2": 0.75})
    assert recovered({label: trio[label] for label in ("dense", "tuned")}) == {}


def test_nothing_is_recovered_where_nothing_was_lost(trio: dict[str, Any]) -> None:
    trio["pruned"] = _result(0.7, 0.5, 0.9, None)
    assert recovered(trio) == {}


def test_table(trio: dict[str, Any]) -> None:
    columns, rows = summary_table(trio)
    assert columns == ["task", "dense", "pruned", "Δ dense", "tuned", "Δ dense", "recovered"]
    assert rows == [
        ["arc_easy", "60.00 ± 1.23", "40.00 ± 1.23", "-20.00", "55.00 ± 1.23", "-5.00", ""],
        ["  acc_norm", "50.00", "30.00", "-20.00", "45.00", "-5.00", ""],
        ["boolq", "80.00 ± 2.00", "60.00 ± 2.00", "-20.00", "75.00 ± 2.00", "-5.00", ""],
        ["average acc", "70.00", "50.00", "-20.00", "65.00", "-5.00", "75.0%"],
        ["perplexity wikitext2", "7.389", "20.086", "+12.696", "9.488", "+2.099", "75.0%"],
    ]


def test_one_model_of_any_name(trio: dict[str, Any]) -> None:
    columns, rows = summary_table({"mine": trio["dense"]})
    assert columns == ["task", "mine"]
    assert rows[-2:] == [["average acc", "70.00"], ["perplexity wikitext2", "7.389"]]


def test_two_models_are_compared_to_the_first(trio: dict[str, Any]) -> None:
    columns, rows = summary_table({"a": trio["tuned"], "b": trio["pruned"]})
    assert columns == ["task", "a", "b", "Δ a"]
    assert rows[0] == ["arc_easy", "55.00 ± 1.23", "40.00 ± 1.23", "-15.00"]


def test_missing_values_are_dashes_and_no_average_is_invented() -> None:
    broken = _result(None, 0.5, 0.8, None)
    assert broken["average"]["value"] is None
    _, rows = summary_table({"dense": broken})
    assert rows[0] == ["arc_easy", "–"]
    assert [row[0] for row in rows] == ["arc_easy", "  acc_norm", "boolq", "perplexity wikitext2"]
    assert rows[-1][1] == "–"


def test_task_without_accuracy_shows_its_own_metric() -> None:
    tasks = {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1, "num_samples": 4}}
    result = {"model": "m", "tasks": tasks, "average": average(tasks), "perplexity": {}}
    assert summary_table({"m": result}) == (["task", "m"], [["gsm8k exact_match,strict-match", "0.250"]])


def test_the_averages_standard_error() -> None:
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc": 0.1, "acc_stderr": 0.04}, "c": {"bleu": 3.0}}
    assert average_stderr(tasks) == pytest.approx(0.05 / 2)
    assert average_stderr({**tasks, "d": {"acc": 0.2, "acc_stderr": None}}) is None
    assert average_stderr({"c": {"bleu": 3.0}}) is None
