"""Plans: what is known of a stage before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lors_cli.data.sources import resolve_data_dir
from lors_cli.errors import MissingError, UsageError
from lors_cli.pipeline.plans import StagePlan, describe, plan_single, plan_stages, select
from lors_cli.pipeline.running import run_single
from lors_cli.recipe.loading import load_recipe
from lors_cli.recipe.schema import EvalConfig, ModelConfig, PruneConfig

RUN = Path("runs/tiny")


def plans(*overrides: str) -> list[StagePlan]:
    return plan_stages(load_recipe(Path("tiny.yaml"), overrides), RUN, None)


def test_planned_fingerprints_are_those_of_the_records(at_finished: Path) -> None:
    for plan in plans():
        assert plan.status == "done"
        assert json.loads((plan.folder / "stage.json").read_text())["fingerprint"] == plan.fingerprint


def test_a_change_reaches_every_stage_after_it(at_finished: Path) -> None:
    def changed(override: str) -> list[bool]:
        return [old.fingerprint != new.fingerprint for old, new in zip(plans(), plans(override), strict=True)]

    assert changed("prune.method=wanda") == [True, True, True]
    assert changed("tune.rank=2") == [False, True, True]
    assert changed("eval.limit=2") == [False, False, True]
    assert changed("model.dtype=float32") == [True, True, True]
    assert changed("model.device=cpu") == [False, False, False]
    assert changed("tune.save_steps=3") == [False, False, False]


def test_a_damaged_result_is_made_anew(at_finished: Path) -> None:
    with open(RUN / "prune" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert plans()[0].status == "run"


def test_stages_that_the_recipe_lacks_are_not_planned(at_workshop: Path) -> None:
    Path("short.yaml").write_text("name: short\nmodel: {path: dense}\nprune: {method: magnitude}\n")
    recipe = load_recipe(Path("short.yaml"))
    assert [plan.stage for plan in plan_stages(recipe, RUN, None)] == ["prune"]


def test_begun_means_that_there_is_something_to_go_on_from(at_workshop: Path) -> None:
    fingerprint = plans()[0].fingerprint
    work = RUN / "prune" / ".work"
    work.mkdir(parents=True)
    (work / "fingerprint.json").write_text(json.dumps(fingerprint))
    assert plans()[0].status == "run"
    (work / "inputs_0001.safetensors").write_bytes(b"x")
    assert plans()[0].status == "resume"
    assert plans("prune.method=wanda")[0].status == "run"


def test_a_stage_on_its_own(at_workshop: Path) -> None:
    model = {"dense": ModelConfig(path="dense")}
    plan = plan_single("prune", PruneConfig(method="magnitude"), model, Path("p"), None)
    assert (plan.stage, plan.status, plan.folder) == ("prune", "run", Path("p"))
    plan = plan_single("eval", EvalConfig(tasks=("boolq", "rte")), model, Path("e"), None)
    assert plan.detail == "2 of 2 measurements to do"
    with pytest.raises(UsageError, match="bolq"):
        plan_single("eval", EvalConfig(tasks=("bolq",)), model, Path("e"), None)


def test_an_evaluation_needs_what_its_largest_model_does(at_workshop: Path) -> None:
    paths = {"small": "dense", "large": "HuggingFaceTB/SmolLM2-135M", "unknown": "nobody/nothing"}
    models = {label: ModelConfig(path=path) for label, path in paths.items()}
    assert plan_single("eval", EvalConfig(tasks=("rte",)), models, Path("e"), None).origin == models["large"]
    del models["large"]
    assert plan_single("eval", EvalConfig(tasks=("rte",)), models, Path("e"), None).origin == models["small"]


def test_a_stage_that_another_process_has_done_meanwhile_is_not_done_again(at_workshop: Path) -> None:
    """Two calls of one command: the second had made its plan before the first published."""
    model = {"dense": ModelConfig(path="dense")}
    plan = plan_single("prune", PruneConfig(method="magnitude"), model, Path("p"), None)
    run_single(plan, None)
    made = Path("p/stage.json").stat().st_mtime_ns
    assert plan.status == "run"
    run_single(plan, None)
    assert Path("p/stage.json").stat().st_mtime_ns == made


def test_select_marks_what_is_forced(at_finished: Path) -> None:
    chosen = select(plans(), "tune", None, ("tune",))
    assert [(plan.stage, plan.status) for plan in chosen] == [("tune", "run"), ("eval", "done")]
    with pytest.raises(UsageError, match="--force prune"):
        select(plans(), "tune", None, ("prune",))


def test_descriptions(at_workshop: Path) -> None:
    prune, tune, evaluation = plans("prune.pattern=unstructured", "prune.sparsity=0.6")
    assert describe(prune) == "sparsegpt unstructured 0.6 (not done yet)"
    assert describe(tune) == "lors rank 4 on rows.jsonl, 6 steps (not done yet)"
    assert (
        describe(evaluation)
        == "dense, pruned, tuned: pydoc_choice, text.jsonl, 3 short texts (6 of 6 measurements to do)"
    )


def test_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_data_dir(None) is None
    monkeypatch.setenv("LORS_DATA_DIR", str(tmp_path))
    assert resolve_data_dir(None) == tmp_path
    (tmp_path / "mine").mkdir()
    assert resolve_data_dir(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("LORS_DATA_DIR", str(tmp_path / "gone"))
    with pytest.raises(MissingError, match=r"\$LORS_DATA_DIR: .*gone"):
        resolve_data_dir(None)
