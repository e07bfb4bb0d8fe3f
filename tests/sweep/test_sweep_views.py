"""What a sweep shows: the dry run, and the table of the cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lors_cli.sweep.views import result_table

Lors = Callable[..., Result]


def test_a_dry_run_lists_each_stage_once_and_writes_nothing(at_start: Path, lors: Lors) -> None:
    before = sorted(at_start.rglob("*"))
    result = lors("sweep", "grid.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "4 of 4 cells of prune.method (2) × tune.method (2)" in result.stdout
    assert "13 stages to run." in result.stdout
    assert "an estimate, by the number of operations at" in result.stdout
    assert "of a matrix product's on this cpu" in result.stdout
    stages = [line.split()[0] for line in result.stdout.splitlines() if line.startswith(("eval-", "prune-", "tune-"))]
    assert len(stages) == len(set(stages)) == 13
    document = json.loads(lors("sweep", "grid.yaml", "--dry-run", "--json", "--tflops", "1").stdout)
    assert document["dry_run"] is True
    assert [cell["status"] for cell in document["cells"]] == ["pending"] * 4
    assert document["cells"][0]["to_run"] == ["eval dense", "prune", "eval pruned", "tune", "eval tuned"]
    by_folder = {Path(stage["folder"]).name: stage for stage in document["stages"]}
    assert sorted(by_folder) == sorted(stages)
    assert document["stages"][0]["cells"] == ["wanda-lors", "wanda-sqft", "magnitude-lors", "magnitude-sqft"]
    estimate = document["estimate"]
    assert estimate["hours"] == pytest.approx(sum(stage["operations"] for stage in document["stages"]) / 1e12 / 3600)
    assert estimate["disk_bytes"] > 13 * 1e6
    assert estimate["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in document["stages"])
    assert "1 TFLOP/s, as given" in estimate["assumption"]
    assert sorted(at_start.rglob("*")) == before


def test_a_dry_run_tells_what_is_done(at_sweep: Path, lors: Lors) -> None:
    result = lors("sweep", "grid.yaml", "--dry-run")
    assert "0 stages to run, 13 are finished." in result.stdout
    document = json.loads(lors("sweep", "grid.yaml", "tune.rank=2", "--only", "wanda-*", "--dry-run", "--json").stdout)
    assert [cell["to_run"] for cell in document["cells"]] == [["tune", "eval tuned"]] * 2
    assert [stage["status"] for stage in document["stages"]].count("done") == 3
    assert "by the pace of finished stages" in document["estimate"]["assumption"]
    assert document["estimate"]["hours"] > 0


def test_the_large_sweeps_are_planned_without_a_network(at_workshop: Path, lors: Lors) -> None:
    stages = {"table1": 34, "table2": 17, "table3": 9, "table4": 17}
    cells = {"table1": 12, "table2": 6, "table3": 3, "table4": 6}
    for name in stages:
        document = json.loads(lors("sweep", name, "--dry-run", "--json", "--tflops", "400").stdout)
        assert len(document["cells"]) == cells[name]
        assert len(document["stages"]) == stages[name]
        assert 1 < document["estimate"]["hours"] < 1000
        assert document["estimate"]["peak_memory_bytes"] < 80e9
        assert document["estimate"]["disk_bytes"] > 50e9


# The table ------------------------------------------------------------------------------------------------------


def scores(acc: float, perplexity: float) -> dict[str, Any]:
    tasks = {"rte": {"acc": acc, "acc_stderr": 0.03}, "boolq": {"acc": acc, "acc_stderr": 0.04}}
    return {
        "tasks": tasks, "average": {"metric": "acc", "value": acc, "tasks": ["rte", "boolq"]},
        "perplexity": {"wikitext2": {"value": perplexity, "tokens": 9, "sequence_length": 9}},
    }  # fmt: skip


def cell(name: str, acc: float, perplexity: float, status: str = "done") -> dict[str, Any]:
    results = {"dense": scores(0.6, 10.0), "pruned": scores(0.4, 1000.0), "tuned": scores(acc, perplexity)}
    if status != "done":
        del results["tuned"]
    return {"name": name, "status": status, "models": dict.fromkeys(("dense", "pruned", "tuned"), ""),
            "results": results}  # fmt: skip


def test_a_row_a_cell_with_the_best_marked() -> None:
    cells = [cell("a", 0.5, 100.0), cell("b", 0.55, 31.6227766), cell("c", 0, 0, "failed"), cell("d", 0.5, 10.0)]
    columns, rows, bold = result_table(cells)
    assert columns == ["cell", "average acc", "ppl wikitext2", "recovered acc", "recovered ppl"]
    assert rows == [
        ["a", "50.00 ±2.5", "100.000", "50.0 %", "50.0 %"],  # √(0.03² + 0.04²)/2; log 100 lies between log 10 and 1000
        ["b", "55.00 ±2.5", "31.623", "75.0 %", "75.0 %"],
        ["c (failed)", "–", "–", "–", "–"],
        ["d", "50.00 ±2.5", "10.000", "50.0 %", "100.0 %"],
    ]
    assert bold == {(1, 1), (3, 2), (1, 3), (3, 4)}


def test_one_row_has_no_best_and_equal_ones_share_it() -> None:
    assert result_table([cell("a", 0.5, 100.0)])[2] == set()
    _, _, bold = result_table([cell("a", 0.5, 100.0), cell("b", 0.5, 100.0)])
    assert {(0, 1), (1, 1), (0, 2), (1, 2)} <= bold


def test_nothing_to_show_is_shown_as_that() -> None:
    assert result_table([cell("a", 0, 0, "pending")])[1] == [["a (pending)", "–"]]
    unscored = {"name": "a", "status": "done", "models": {}, "results": {}}
    assert result_table([unscored])[1] == [["a", "–"]]


def test_the_table_fits_80_columns(at_sweep: Path, lors: Lors) -> None:
    result = lors("sweep", "grid.yaml")
    assert max(len(line) for line in result.stdout.splitlines() if "─" in line) <= 80
    assert "ppl text.jsonl" in result.stdout
    assert lors("sweep", "grid.yaml", "-q").stderr == ""
