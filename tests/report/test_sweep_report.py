"""The whole report of a sweep, from a folder to its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_pages import Page, is_safe
from sweep_folder import SweepFolder, shares
from typer.testing import Result

from lors_cli.output.markdown import to_markdown
from lors_cli.report.drawing import style
from lors_cli.report.groups import groups
from lors_cli.report.latex import escape
from lors_cli.report.results import read_sweep
from lors_cli.report.stage_figures import cost
from lors_cli.report.sweep import sweep_blocks, write_sweep_report

HOSTILE = "<script>alert(1)</script> $x_1$ | a_b & 50% \\input{z}"
FIGURES = ["accuracy", "cost", "loss", "perplexity", "sparsity"]


def markdown(folder: Path) -> str:
    sweep = read_sweep(folder)
    return to_markdown(sweep_blocks(sweep, groups(sweep), FIGURES))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*folder.glob("report.*"), *folder.glob("figures/*")]}


def test_files_and_the_same_bytes_again(sweep: Path) -> None:
    paths = write_sweep_report(sweep)
    assert paths == [sweep / f"report.{kind}" for kind in ("md", "html", "csv", "tex")]
    first = everything(sweep)
    assert sorted(first) == sorted([*(path.name for path in paths), *(f"{name}.png" for name in FIGURES)])
    html = first["report.html"].decode()
    page = Page(html)
    assert is_safe(page)
    assert sum(tag == "svg" for tag, _ in page.tags) == len(FIGURES)
    assert "http" not in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(html) < 400_000
    for name in FIGURES:
        assert first[f"{name}.png"].startswith(b"\x89PNG")
        assert f"](figures/{name}.png)" in first["report.md"].decode()
    kept = {sweep / f"report.{kind}": (sweep / f"report.{kind}").stat().st_mtime_ns for kind in ("md", "csv", "tex")}
    for path in (sweep / "report.html", *(sweep / "figures").iterdir()):
        path.unlink()
    write_sweep_report(sweep)
    assert everything(sweep) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what already says so is not touched"


def test_what_it_says(sweep: Path) -> None:
    text = markdown(sweep)
    for part in (
        "6 cells: 4 done, 1 failed, 1 pending.",
        "Varied: prune.method: sparsegpt, wanda; tune.method: lors, spp, sqft.",
        "| SparseGPT + LoRS | **46.00** ± 1.00 |",
        "| ↳ paper (ours − paper) | 40.70 (+5.30) |",
        "| Wanda + SPP (failed) | – |",
        "| Wanda + SQFT (pending) | – |",
        "| wanda-spp | failed | prune | Not enough memory: 3.1 GiB are missing. |",
        "| sparsegpt-lors | 1 min 40 s | 16 min 40 s | 2 min 30 s | 1,234 | 60 | 3.2500 | 1.8750 | 4,884,480 | 2:4 |",
        "prints 57.94",
    ):
        assert part in text
    # 2 prunings of 100 s, 4 tunings of 1000 s, 1 + 2 + 4 evaluations of 50 s
    assert "All stages together took 1 h 15 min" in text
    assert "peak memory" not in text


def test_peak_memory_where_a_stage_recorded_it(sweep: Path) -> None:
    path = sweep / "stages/tune-wanda-lors/stage.json"
    record = json.loads(path.read_text())
    record["metrics"]["peak_bytes"] = 3 * 2**30
    path.write_text(json.dumps(record))
    text = markdown(sweep)
    assert "| peak memory |" in text
    assert re.search(r"^\| wanda-lors .* 3\.0 GiB \|$", text, re.MULTILINE)


def test_the_time_of_packing_is_told_and_drawn(sweep: Path) -> None:
    index = json.loads((sweep / "sweep.json").read_text())
    (cell,) = (cell for cell in index["cells"] if cell["name"] == "wanda-lors")
    cell["stages"]["pack"] = "stages/pack"
    (sweep / "sweep.json").write_text(json.dumps(index))
    record = json.loads((sweep / "stages/tune-wanda-lors/stage.json").read_text())
    record |= {"stage": "pack", "metrics": {"bytes": 9, "bytes_before": 16}, "elapsed_s": 600.0}
    (sweep / "stages/pack").mkdir()
    (sweep / "stages/pack/stage.json").write_text(json.dumps(record))
    text = markdown(sweep)
    assert "| cell | prune | tune | pack | eval |" in text
    assert "| wanda-lors | 1 min 40 s | 16 min 40 s | 10 min 00 s | 2 min 30 s |" in text
    assert "All stages together took 1 h 25 min" in text
    with style():
        figure = cost(read_sweep(sweep).cells)
    assert figure is not None
    assert [part.get_text() for part in figure.axes[0].get_legend().get_texts()] == ["prune", "tune", "pack", "eval"]


def test_what_earlier_settings_have_finished_is_apart_and_what_failed_is_told(sweep: Path) -> None:
    index = json.loads((sweep / "sweep.json").read_text())
    for place, (cell, error) in enumerate(zip(index["cells"], (None, "no room", None), strict=False)):
        later = {**cell, "status": "failed" if error else "pending", "error": error,
                 "stages": {**cell["stages"], "tune": "stages/none"},
                 "models": {**cell["models"], "tuned": "stages/no-scores"}}  # fmt: skip
        if place:
            index["cells"][place] = {**cell, "unfinished": later}
    (sweep / "sweep.json").write_text(json.dumps(index))
    found = {group.title: [model.label for model in group.models] for group in groups(read_sweep(sweep))}
    assert found["SparseGPT 2:4"] == ["SparseGPT", "SparseGPT + LoRS"]
    assert found["SparseGPT 2:4, earlier settings"] == [
        "SparseGPT + SPP (earlier settings)", "SparseGPT + SQFT (earlier settings)",
    ]  # fmt: skip
    text = markdown(sweep)
    for part in (
        "6 cells: 2 done, 2 failed, 2 pending. Earlier settings had finished 2 of those that are not done",
        "| SparseGPT + SPP (earlier settings) | **44.00** ± 1.00 |",
        "| sparsegpt-spp | failed | prune | no room |",
        "| sparsegpt-sqft | pending | prune | – |",
        "| sparsegpt-spp (earlier settings) | 1 min 40 s |",
        "These are the earlier settings; what the last ones change",
    ):
        assert part in text
    assert "earlier settings" not in markdown(hostile_sweep(sweep.parent / "other"))


def hostile_sweep(folder: Path) -> Path:
    made = SweepFolder(folder, HOSTILE, {"tune.method": [HOSTILE]})
    stages = {"prune": made.prune("stages/p", "wanda"), "tune": made.tune("stages/t", HOSTILE)}
    models = {"dense": made.score("stages/d", "dense", shares(0.5), 6.0),
              "tuned": made.score("stages/e", "tuned", {HOSTILE: 0.5, "rte": 0.25}, 1e4)}  # fmt: skip
    made.cell(HOSTILE, {"tune.method": HOSTILE}, stages=stages, models=models, recipe=HOSTILE)
    made.cell("failed", {"seed": HOSTILE}, stages={**stages, "tune": "stages/none"}, models={}, status="failed",
              error=HOSTILE)  # fmt: skip
    made.close()
    (folder / "sweep.yaml").write_text(f"name: {HOSTILE}\n```\n</code></pre>{HOSTILE}\n")
    return folder


def test_names_are_only_names(tmp_path: Path) -> None:
    folder = hostile_sweep(tmp_path / "s")
    write_sweep_report(folder)
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert is_safe(page)
    said = [text for _, text in page.texts]
    assert HOSTILE in said
    assert any(text.startswith(f"Wanda + {HOSTILE[:30]}") for tag, text in page.texts if tag == "text")
    assert html.count("alert(1)") == sum(text.count("alert(1)") for text in said)
    text = (folder / "report.md").read_text()
    outside = text[: text.index("## Settings")]
    assert not re.search(r"(?<!\\)<script", outside)
    assert "````yaml\n" in text
    tex = (folder / "report.tex").read_text()
    assert escape(HOSTILE) in tex
    assert not any(raw in tex for raw in ("\\input{", "$x_1$", "a_b & 50%"))
    rows = tex[tex.index("\\midrule") : tex.index("\\bottomrule")].splitlines()
    widths = {len(re.findall(r"(?<!\\)&", row)) for row in rows if "multicolumn" not in row and row.endswith("\\\\")}
    assert widths == {len(shares(0)) + 3}  # columns after the first: the seven tasks and one more, average, perplexity


@pytest.mark.parametrize("formats", [["csv"], ["tex", "csv"]])
def test_chosen_formats_alone_are_written(sweep: Path, formats: list[str]) -> None:
    paths = write_sweep_report(sweep, formats)
    assert [path.suffix[1:] for path in paths] == sorted(formats)
    assert sorted(everything(sweep)) == sorted(path.name for path in paths)


def test_a_sweep_before_its_first_stage(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path / "new", "new", {"seed": [0, 1]})
    for seed in (0, 1):
        made.cell(f"s{seed}", {"seed": seed}, status="pending", stages={"prune": "stages/p", "tune": f"stages/{seed}"},
                  models={"dense": "stages/d", "tuned": f"stages/e{seed}"})  # fmt: skip
    write_sweep_report(made.close())
    text = (made.folder / "report.md").read_text()
    assert "2 cells: 2 pending." in text
    assert "| tuned (seed 1) (pending) |" in text
    assert "## Sparsity" not in text
    assert "figures/" not in text
    assert not (made.folder / "figures").exists()


def test_a_sweep_without_cells(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "none", {}).close()
    assert markdown(folder).startswith("# none\n\nNo cell.\n")


def test_the_command_takes_a_sweeps_folder(sweep: Path, lors: Callable[..., Result]) -> None:
    found = lors("report", str(sweep), "--format", "tex", "--format", "csv", "--json")
    assert json.loads(found.stdout) == {"reports": [f"{sweep}/report.csv", f"{sweep}/report.tex"]}
    (sweep / "sweep.json").write_text("{")
    broken = lors("report", str(sweep))
    assert broken.exit_code == 2
    assert "is not the index of a sweep" in " ".join(broken.stderr.split())
