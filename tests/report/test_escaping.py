"""No name in a run's records gets markup into its page: whatever the texts, the page stays closed, plain and theirs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_pages import Page, is_safe
from sweep_folder import SweepFolder, shares

from lors_cli.recipe.schema import STAGES
from lors_cli.report.drawing import style, svg
from lors_cli.report.run import write_run_report
from lors_cli.report.sweep import write_sweep_report

PIECES = ("<script>alert(1)</script>", "</script>", "</title>", "<img src=x onerror=alert(2)>", '"', "'", "&", "&lt;",
          "<!--", "-->", "]]>", "</svg>", "</text>", "<svg onload=alert(3)>", " onmouseover=x ", "javascript:alert(4)",
          "`", "|", "\\", "*", "[x](javascript:y)", "$x^2$", "#", "\n", "é", "\u202e", "\x7f")  # fmt: skip
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
HOSTILE = st.lists(st.sampled_from(PIECES) | PLAIN, min_size=1, max_size=6).map("".join)
BOUNDS = {"max_examples": 2, "deadline": None, "derandomize": True,
          "suppress_health_check": [HealthCheck.function_scoped_fixture]}  # fmt: skip


def quoted(text: str) -> str:
    """A text as YAML of one line."""
    return yaml.safe_dump(text, default_style='"', width=math.inf).strip()


def page_of(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert is_safe(page)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "a")]
    return page


@settings(**BOUNDS)
@given(name=HOSTILE, task=HOSTILE, model=HOSTILE)
def test_a_runs_page(finished_workshop: Path, tmp_path: Path, name: str, task: str, model: str) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished_workshop / "runs" / "tiny", run)
    shutil.rmtree(run / "figures", ignore_errors=True)
    for role in ("dense", "pruned", "tuned"):
        path = run / "eval" / f"{role}.json"
        content: dict[str, Any] = json.loads(path.read_text())
        content["model"] = model
        content["tasks"] = {task: next(iter(content["tasks"].values()))}
        content["perplexity"] = {name: next(iter(content["perplexity"].values()))}
        path.write_text(json.dumps(content))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("path: dense", f"path: {quoted('x' + model)}"))
    write_run_report(run, STAGES, ("html", "md"))
    page_of(run / "report.html")


@settings(**{**BOUNDS, "max_examples": 2})
@given(cell=HOSTILE, error=HOSTILE)
def test_a_sweeps_page(tmp_path: Path, cell: str, error: str) -> None:
    folder = tmp_path / "sweep"
    shutil.rmtree(folder, ignore_errors=True)
    made = SweepFolder(folder, "sweep", {"tune.method": ["lors", cell]})
    models = {"dense": made.score("stages/eval-d", "dense", shares(0.5), 6.0)}
    pruned = made.prune("stages/prune-a", "wanda")
    models["pruned"] = made.score("stages/eval-a", "pruned", shares(0.4), 9.0)
    for number, (value, status) in enumerate((("lors", "done"), (cell, "failed"))):
        made.cell(f"c{number}", {"tune.method": value}, stages={"prune": pruned}, models=models, status=status,
                  error=error)  # fmt: skip
    made.close()
    write_sweep_report(folder, ("html",))
    page_of(folder / "report.html")


@settings(**{**BOUNDS, "max_examples": 8})
@given(label=HOSTILE)
def test_text_in_a_figure(label: str) -> None:
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(2, 1))
        axes = figure.subplots()
        axes.plot([0, 1], label=label)
        axes.set_title(label)
        axes.set_xticks([0.0], [label])
        axes.legend()
        text = svg(figure, "f1")
    page = Page(text)
    assert not {"script", "img", "foreignobject", "a"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("piece", PIECES)
def test_the_pieces_would_be_seen(piece: str) -> None:
    """The checks above can fail: a page with such a piece in it as it is breaks one of them, where it is markup."""
    if not piece.startswith(("<script", "<img", "<svg")):
        return
    with pytest.raises(AssertionError):
        is_safe(Page(f"<html><head><style>x</style></head><body>{piece}</body></html>"))
