"""The paper's figures as shipped, and which of them stand beside which measurement."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from lors_cli.report.paper import find_paper_row, model_key, paper_rows

SEVEN = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"]


def test_every_row_is_there() -> None:
    rows = paper_rows()
    assert [sum(row.table == number for row in rows) for number in (1, 2, 3, 4)] == [18, 9, 4, 8]
    assert all(list(row.acc) == SEVEN for row in rows)
    assert {row.model for row in rows} == {"Llama-2-7B", "Llama-2-13B", "Llama-3-8B"}


def test_rows_are_those_of_the_reference(shared_dir: Path) -> None:
    path = shared_dir / "reference/paper_tables.json"
    if not path.is_file():
        pytest.skip("no reference")
    reference = json.loads(path.read_text())["rows"]
    ours = [vars(row) for row in paper_rows()]
    assert ours == [{key: value for key, value in row.items() if key != "average"} for row in reference]


def test_averages_are_recomputed_and_one_printed_one_is_off() -> None:
    for row in paper_rows():
        assert row.average() == pytest.approx(mean(row.acc.values()))
    (wrong,) = [row for row in paper_rows() if row.is_misprinted]
    assert (wrong.model, wrong.prune, wrong.tune, wrong.table) == ("Llama-3-8B", "sparsegpt", "lors", 1)
    assert wrong.average_printed == 57.94
    assert round(wrong.average() or 0, 2) == 57.12


def test_average_of_some_tasks() -> None:
    row = find_paper_row("meta-llama/Llama-2-7b-hf")
    assert row is not None
    assert row.average(["boolq", "rte"]) == pytest.approx((77.74 + 62.82) / 2)
    assert row.average(["boolq", "pydoc_choice"]) is None
    assert row.average([]) is None


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("NousResearch/Llama-2-7b-hf", "llama-2-7b"),
        ("/models/Llama-2-13b-hf/", "llama-2-13b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("/c/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b-instruct"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
    ],
)
def test_model_key(path: str, key: str) -> None:
    assert model_key(path) == key


@pytest.mark.parametrize(
    ("settings", "table", "boolq"),
    [
        ({}, 1, 81.35),
        ({"prune": "wanda", "pattern": "2:4"}, 1, 66.18),
        ({"prune": "wanda", "pattern": "2:4", "tune": "lors", "data": "alpaca"}, 1, 77.03),
        ({"prune": "sparsegpt", "pattern": "2:4", "tune": "spp-gc", "data": "alpaca"}, 1, 75.35),
        ({"prune": "sparsegpt", "pattern": "unstructured", "sparsity": 0.5}, 3, None),
        ({"prune": "wanda", "pattern": "2:4", "tune": "lors", "data": "slimpajama"}, 4, None),
    ],
)
def test_rows_that_match(settings: dict[str, str], table: int, boolq: float | None) -> None:
    row = find_paper_row("meta-llama/Meta-Llama-3-8B", **settings)  # type: ignore[arg-type]
    assert row is not None
    assert row.table == table
    assert boolq is None or row.acc["boolq"] == boolq


@pytest.mark.parametrize(
    "settings",
    [
        {"prune": "magnitude", "pattern": "2:4"},
        {"prune": "wanda", "pattern": "4:8"},
        {"prune": "wanda", "pattern": "2:4", "tune": "lors", "data": "c4"},
        {"prune": "wanda", "pattern": "2:4", "tune": "hira", "data": "alpaca"},
        {"prune": "sparsegpt", "pattern": "unstructured", "sparsity": 0.6},
        {"tune": "lors", "data": "alpaca"},
    ],
)
def test_rows_that_the_paper_has_not(settings: dict[str, str]) -> None:
    assert find_paper_row("meta-llama/Meta-Llama-3-8B", **settings) is None  # type: ignore[arg-type]


def test_an_unknown_model_has_no_row() -> None:
    assert find_paper_row("HuggingFaceTB/SmolLM2-135M") is None
    assert find_paper_row("") is None
