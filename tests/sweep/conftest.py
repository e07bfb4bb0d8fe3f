"""A tiny sweep over the workshop's recipe, finished once for all tests."""

from __future__ import annotations

import os
import shutil
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lors_cli.cli.app import app

TINY_SWEEP = """\
# Two pruners, two tuners.
name: grid
recipe: tiny.yaml
set: {tune.max_steps: 2, eval.limit: 2, eval.perplexity_windows: 2}
grid:
  prune.method: [wanda, magnitude]
  tune.method: [lors, sqft]
per:
  tune.method:
    sqft: {tune.learning_rate: 3e-3}
"""


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders a report was asked for; the report itself is tested with its own module."""
    asked: list[Path] = []

    def write_sweep_report(folder: Path) -> list[Path]:
        asked.append(folder)
        return [folder / "report.md"]

    module = types.ModuleType("lors_cli.report.sweep")
    module.write_sweep_report = write_sweep_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lors_cli.report.sweep", module)
    return asked


@pytest.fixture(scope="session")
def finished_sweep(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workshop in which `lors sweep grid.yaml` has run to its end."""
    folder = tmp_path_factory.mktemp("swept") / "workshop"
    shutil.copytree(workshop, folder)
    (folder / "grid.yaml").write_text(TINY_SWEEP)
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "lors_cli.report.sweep", raising=False)  # the real one
        result = CliRunner().invoke(app, ["sweep", "grid.yaml"])
    os.chdir(before)
    assert result.exit_code == 0, result.output
    assert {"report.md", "report.html", "report.csv", "report.tex"} <= {
        path.name for path in folder.glob("sweeps/grid/*")
    }
    return folder


@pytest.fixture
def at_sweep(finished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a fresh copy of the workshop with the finished sweep sweeps/grid."""
    folder = tmp_path / "workshop"
    shutil.copytree(finished_sweep, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def at_start(at_workshop: Path) -> Path:
    """The current folder is a fresh copy of the workshop with the sweep's file, nothing run."""
    Path("grid.yaml").write_text(TINY_SWEEP)
    return at_workshop
