"""What a sweep shows: the dry run, and how wide the table of the cells is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lors_cli.cli.views import sweeps
from lors_cli.output import console

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


def test_the_table_fits_80_columns(at_sweep: Path, lors: Lors) -> None:
    result = lors("sweep", "grid.yaml")
    assert max(len(line) for line in result.stdout.splitlines() if "─" in line) <= 80
    assert "ppl text.jsonl" in result.stdout
    assert lors("sweep", "grid.yaml", "-q").stderr == ""


def test_no_name_and_no_number_is_cut_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console.configure()
    texts = [f"text-{number}.jsonl" for number in range(6)]
    scores = {"model": "m", "tasks": {}, "average": None,
              "perplexity": {text: {"value": 1234.5, "tokens": 9, "sequence_length": 3} for text in texts}}  # fmt: skip
    name = "prune.calibration.dataset=slimpajama-tune.learning_rate=0.0001"
    cell = {"name": name, "status": "done", "models": {"tuned": "e"}, "results": {"tuned": scores}}
    sweeps.show_sweep({"cells": [cell], "done": [], "failed": {}, "sweep": "s", "report": []})
    shown = capsys.readouterr().out
    assert all(f"ppl {text}" in shown for text in texts)
    assert "…" not in shown
    stages = [{"stage": stage, "status": "waiting", "detail": "", "folder": "f"}
              for stage in ("eval dense", "prune", "eval pruned", "tune", "pack", "eval tuned")]  # fmt: skip
    sweeps.show_status({"cells": [{"name": name, "status": "waiting", "stages": stages}]})
    shown = capsys.readouterr().out
    assert all(stage["stage"] in shown for stage in stages)
    assert "…" not in shown
    console.table(["cell", "state", "left to do"], [[name, "pending", "eval dense, prune"]], prose=True)
    first, *rest = capsys.readouterr().out.splitlines()[2:]
    assert first.split()[0] + rest[0].split()[0] == name
