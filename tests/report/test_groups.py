"""Sweeps' folders, read and grouped: finished ones, half-finished ones, and ones that are no sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import BASE, SweepFolder, shares

from lors_cli.errors import UsageError
from lors_cli.report.drawing import style
from lors_cli.report.groups import groups, model_label, pattern_name
from lors_cli.report.results import read_sweep
from lors_cli.report.score_figures import accuracy_panels
from lors_cli.report.stage_figures import loss_of_cells, sparsity_by_model

PRUNE = {"method": "sparsegpt", "pattern": "2:4", "sparsity": None}
TUNE = {"method": "lors", "data": {"dataset": "alpaca"}}


def labels(folder: Path) -> dict[str, list[str]]:
    return {group.title: [model.label for model in group.models] for group in groups(read_sweep(folder))}


def test_groups_are_the_papers(sweep: Path) -> None:
    assert labels(sweep) == {
        "Meta-Llama-3-8B": ["dense"],
        "SparseGPT 2:4": ["SparseGPT", "SparseGPT + LoRS", "SparseGPT + SPP", "SparseGPT + SQFT"],
        "Wanda 2:4": ["Wanda", "Wanda + LoRS", "Wanda + SPP", "Wanda + SQFT"],
    }
    models = {model.label: model for group in groups(read_sweep(sweep)) for model in group.models}
    assert {model.base for model in models.values()} == {BASE}
    assert [models[f"Wanda + {name}"].status for name in ("LoRS", "SPP", "SQFT")] == ["done", "failed", "pending"]
    assert models["Wanda"].cells == ("wanda-lors", "wanda-spp", "wanda-sqft")
    assert models["Wanda + LoRS"].shares["accuracy"] == pytest.approx(0.4)  # 47 to 53 of 62
    assert models["Wanda + LoRS"].paper is not None
    assert models["Wanda + SPP"].error == "Not enough memory: 3.1 GiB are missing."
    assert models["Wanda"].error is None


def test_what_varies_is_in_the_label(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path, "rates", {"tune.learning_rate": [1e-4, 1e-3], "tune.rank": [8, 16]})
    pruned = made.prune("stages/p", "wanda")
    for rate in (1e-4, 1e-3):
        for rank in (8, 16):
            path = f"stages/t-{rate}-{rank}"
            values = {"tune.learning_rate": rate, "tune.rank": rank}
            models = {"tuned": made.score(f"{path}-e", "tuned", shares(0.4), 9.0)}
            made.cell(f"{rate}-{rank}", values, stages={"prune": pruned, "tune": made.tune(path, "lors")},
                      models=models)  # fmt: skip
    assert labels(made.close()) == {
        "Wanda 2:4": [
            "Wanda + LoRS (learning_rate 0.0001, rank 8)", "Wanda + LoRS (learning_rate 0.0001, rank 16)",
            "Wanda + LoRS (learning_rate 0.001, rank 8)", "Wanda + LoRS (learning_rate 0.001, rank 16)",
        ]
    }  # fmt: skip


def test_cells_that_nothing_tells_apart_get_their_names(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path, "twins", {})
    for name, recipe in (("one", "a"), ("two", "b")):
        stages = {"prune": made.prune("stages/p", "wanda"), "tune": made.tune(f"stages/t-{name}", "lors")}
        models = {"tuned": made.score(f"stages/e-{name}", "tuned", shares(0.4), 9.0)}
        made.cell(name, {}, stages=stages, models=models, recipe=recipe)
    assert labels(made.close()) == {"Wanda 2:4": ["Wanda + LoRS [one]", "Wanda + LoRS [two]"]}


def test_several_models_patterns_and_evaluations(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path, "many", {"model.path": ["a/one", "b/two"], "eval.limit": [10, 20]})
    for base in ("a/one", "b/two"):
        for limit in (10, 20):
            key = f"{base[0]}-{limit}"
            pruned = made.stage(f"stages/p-{base[0]}", "prune",
                                {"method": "ria", "pattern": "unstructured", "sparsity": 0.6}, {}, 1.0,
                                origin=base)  # fmt: skip
            models = {role: made.score(f"stages/e-{role}-{key}", role, shares(0.4), 9.0, limit=limit)
                      for role in ("dense", "pruned")}  # fmt: skip
            made.cell(key, {"model.path": base, "eval.limit": limit}, stages={"prune": pruned}, models=models)
    assert labels(made.close()) == {
        "one": ["dense (limit 10)", "dense (limit 20)"],
        "one, RIA 60% unstructured": ["RIA (limit 10)", "RIA (limit 20)"],
        "two": ["dense (limit 10)", "dense (limit 20)"],
        "two, RIA 60% unstructured": ["RIA (limit 10)", "RIA (limit 20)"],
    }
    assert [model.name for group in groups(read_sweep(tmp_path)) for model in group.models][1:4] == [
        "one: dense (limit 20)", "one, 60% unstructured: RIA (limit 10)", "one, 60% unstructured: RIA (limit 20)",
    ]  # fmt: skip


def patterns(folder: Path) -> Path:
    """Wanda + LoRS of two patterns, no dense model; layers have other shares in each."""
    made = SweepFolder(folder, "patterns", {"prune.pattern": ["2:4", "4:8"]})
    for pattern, share in (("2:4", 0.5), ("4:8", 0.25)):
        layers = [{"name": f"model.layers.{block}.mlp.up_proj", "shape": [4, 4], "sparsity": share}
                  for block in range(2)]  # fmt: skip
        pruned = made.stage(f"stages/p-{pattern}", "prune", {"method": "wanda", "pattern": pattern}, {"layers": layers},
                            1.0)  # fmt: skip
        tuned = made.tune(f"stages/t-{pattern}", "lors")
        models = {role: made.score(f"stages/e-{role}-{pattern}", role, shares(0.4), 9.0)
                  for role in ("pruned", "tuned")}  # fmt: skip
        made.cell(pattern, {"prune.pattern": pattern}, stages={"prune": pruned, "tune": tuned}, models=models)
    return made.close()


def test_figures_tell_the_models_of_several_groups_apart(tmp_path: Path) -> None:
    sweep = read_sweep(patterns(tmp_path))
    found = groups(sweep)
    assert [model.label for model in found[1].models] == ["Wanda", "Wanda + LoRS"], "the title tells the rest"
    with style():
        panels, losses, sparse = accuracy_panels(found), loss_of_cells(sweep.cells, found), sparsity_by_model(found)
    names = ["2:4: Wanda", "2:4: Wanda + LoRS", "4:8: Wanda", "4:8: Wanda + LoRS"]
    assert panels is not None
    assert [tick.get_text() for tick in panels.axes[0].get_yticklabels()] == names
    assert losses is not None
    assert [line.get_label() for line in losses.axes[0].lines] == names[1::2]
    assert sparse is not None
    assert {"2:4: Wanda", "4:8: Wanda"} <= {tick.get_text() for tick in sparse.axes[0].get_yticklabels()}


def test_groups_that_nothing_tells_apart_have_the_cells_names(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path, "recipes", {})
    for recipe in ("a", "b"):
        models = {"pruned": made.score(f"stages/e-{recipe}", "pruned", shares(0.4), 9.0)}
        made.cell(recipe, {}, stages={"prune": made.prune(f"stages/p-{recipe}", "wanda")}, models=models, recipe=recipe)
    found = groups(read_sweep(made.close()))
    assert [model.label for group in found for model in group.models] == ["Wanda [a]", "Wanda [b]"]


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path, "new", {"prune.method": ["wanda"], "tune.method": ["lors", "spp"]})
    for tune in ("lors", "spp"):
        made.cell(tune, {"prune.method": "wanda", "tune.method": tune}, status="pending", recipe="smol",
                  stages={"prune": "stages/p", "tune": f"stages/t-{tune}"},
                  models={"dense": "stages/d", "pruned": "stages/e", "tuned": f"stages/e-{tune}"})  # fmt: skip
    (dense, rest) = groups(read_sweep(made.close()))
    assert dense.title == "smol"  # the recipe's name, as long as no stage says which model it is
    assert [(model.label, model.status) for model in rest.models] == [
        ("Wanda", "pending"), ("Wanda + LoRS", "pending"), ("Wanda + SPP", "pending"),
    ]  # fmt: skip


def test_a_model_is_scored_only_once_its_folder_is_finished(tmp_path: Path) -> None:
    made = SweepFolder(tmp_path, "half", {})
    models = {"dense": made.score("stages/d", "dense", shares(0.5), 6.0)}
    made.cell("c", {}, status="running", stages={"prune": "stages/p"}, models=models)
    folder = made.close()
    assert groups(read_sweep(folder))[0].models[0].status == "done"
    (folder / "stages/d/stage.json").unlink()
    assert groups(read_sweep(folder))[0].models[0].status == "running"


def test_seconds_of_a_cell(sweep: Path) -> None:
    cells = {cell.name: cell for cell in read_sweep(sweep).cells}
    assert cells["wanda-lors"].seconds() == {"prune": 100.0, "tune": 1000.0, "eval": 150.0}
    assert cells["wanda-spp"].seconds() == {"prune": 100.0, "eval": 100.0}


@pytest.mark.parametrize("content", [None, [], {}, {"cells": 3}, {"cells": [1]}, {"cells": [{"status": "done"}]}])
def test_no_sweep(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"sweep\.json is not the index of a sweep"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("role", "prune", "tune", "label"),
    [
        ("dense", PRUNE, TUNE, "dense"),
        ("pruned", PRUNE, {}, "SparseGPT"),
        ("tuned", PRUNE, TUNE, "SparseGPT + LoRS"),
        ("tuned", {}, TUNE, "LoRS"),
        ("tuned", {"method": "new"}, {}, "new + tuned"),
        ("pruned", {}, {}, "pruned"),
    ],
)
def test_labels(role: str, prune: dict[str, Any], tune: dict[str, Any], label: str) -> None:
    assert model_label(role, prune, tune) == label


def test_pattern_names() -> None:
    assert pattern_name(PRUNE) == "2:4"
    assert pattern_name({"pattern": "unstructured", "sparsity": 0.6}) == "60% unstructured"
    assert pattern_name({}) == ""
