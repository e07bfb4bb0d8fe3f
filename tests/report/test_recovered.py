"""“Recovered 600 %” of a loss that is no loss: “—” and why, wherever the share is shown."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import SweepFolder, eval_content, shares, write_json

from lors_cli.cli.views.runs import show_results
from lors_cli.cli.views.sweeps import show_sweep
from lors_cli.evaluation.summary import LOST_IN_ERROR
from lors_cli.recipe.schema import STAGES
from lors_cli.report.run import write_run_report
from lors_cli.report.sweep import write_sweep_report

SCORES = {"dense": (0.500, 6.0), "pruned": (0.498, 9.0), "tuned": (0.510, 7.0)}
"""Averages over seven tasks of ± 0.01 each: ± 0.0038, so the loss of 0.002 is ± 0.0053, and 600 % of it came back."""


def parts(text: str) -> list[dict[str, str]]:
    return [row for row in csv.DictReader(io.StringIO(text)) if row["measure"] == "recovered"]


def check(paths: list[Path]) -> None:
    md, html, table, tex = (path.read_text() for path in paths)
    for text in (md, html, tex):
        assert "600.0" not in text
    assert "—" in md
    assert "no more than the standard error of that difference" in md
    assert "no more than the standard error of that difference" in html
    assert r"\textemdash{}" in tex
    assert "no more than the standard error of that difference" in tex
    (accuracy,) = (row for row in parts(table) if row["name"] == "accuracy")
    assert (accuracy["value"], accuracy["error"]) == ("", LOST_IN_ERROR)
    (perplexity,) = (row for row in parts(table) if row["name"].startswith("perplexity"))
    assert float(perplexity["value"]) == pytest.approx(61.98, abs=0.01)  # log(9/7) / log(9/6)


def test_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results: dict[str, Any] = {role: eval_content("m", shares(acc), text) for role, (acc, text) in SCORES.items()}
    for role, content in results.items():
        write_json(tmp_path / "eval" / f"{role}.json", content)
    check(write_run_report(tmp_path, STAGES))
    assert "accuracy —" in (tmp_path / "report.md").read_text()
    show_results(results)
    shown = capsys.readouterr().out
    assert "Tuning won back — of what pruning lost in average accuracy." in shown
    assert "Tuning won back 62.0 % of what pruning lost in log-perplexity on wikitext2." in shown
    assert LOST_IN_ERROR in shown


def test_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = SweepFolder(tmp_path / "sweep", "small", {})
    stages = {"prune": made.prune("stages/prune", "wanda"), "tune": made.tune("stages/tune", "lors")}
    models = {role: made.score(f"stages/{role}", role, shares(acc), text) for role, (acc, text) in SCORES.items()}
    made.cell("only", {}, stages=stages, models=models)
    made.close()
    check(write_sweep_report(made.folder))
    results = {role: eval_content("m", shares(acc), text) for role, (acc, text) in SCORES.items()}
    cell = {"name": "only", "status": "done", "models": models, "results": results}
    show_sweep({"cells": [cell], "done": [], "failed": {}, "sweep": "s", "report": []})
    shown = capsys.readouterr().out
    assert "—" in shown.splitlines()[2]
    assert LOST_IN_ERROR in shown
