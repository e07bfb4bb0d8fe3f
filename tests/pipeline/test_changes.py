"""What a plan says of an earlier result that it would replace: which settings, which inputs, and what is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lors_cli.files import records
from lors_cli.pipeline.plans import StagePlan, plan_single, plan_stages
from lors_cli.recipe.loading import load_recipe, stage_config
from lors_cli.recipe.schema import EvalConfig, ModelConfig, TuneConfig

RUN = Path("runs/tiny")
Lors = Callable[..., Result]


def plans(*overrides: str) -> list[StagePlan]:
    return plan_stages(load_recipe(Path("tiny.yaml"), overrides), RUN, None)


def tuned() -> TuneConfig:
    """The settings of the finished tune stage."""
    record = records.read_record(RUN / "tune")
    assert record is not None
    return stage_config("tune", record.config)  # type: ignore[no-any-return]


def alone(config: TuneConfig, model: Path = RUN / "prune") -> StagePlan:
    """The plan of `lors tune` on the run's folder of tuning."""
    return plan_single("tune", config, {"pruned": ModelConfig(path=str(model), dtype="bfloat16")}, RUN / "tune", None)


def edit_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "stage.json").read_text())
    change(content)
    (folder / "stage.json").write_text(json.dumps(content))


def test_nothing_is_said_of_what_is_done_or_was_never_there(at_finished: Path) -> None:
    assert [plan.replaces for plan in plans()] == ["", "", ""]
    assert [plan.replaces for plan in plan_stages(load_recipe(Path("tiny.yaml")), Path("runs/new"), None)] == [
        "",
        "",
        "",
    ]


def test_a_changed_setting_is_named_with_both_values(at_finished: Path) -> None:
    _, tune, scores = plans("tune.rank=2", "tune.save_steps=99")
    assert tune.detail == "rank 4 → 2, replaces a model tuned for 6 steps; to keep it: --out OTHER"
    assert "tuned has changed, replaces scores of dense, pruned, tuned" in scores.replaces
    assert "dense has changed" not in scores.replaces


def test_what_a_changed_method_implies_is_named_too(at_finished: Path) -> None:
    plan = plans("tune.method=sqft")[1]
    assert plan.replaces.startswith(
        "method lors → sqft, init gradient → kaiming, rounding stochastic → nearest, replaces"
    )


def test_a_new_pruned_model_is_what_changes_for_tuning(at_finished: Path) -> None:
    prune, tune, _ = plans("prune.pattern=4:8")
    assert prune.replaces == "pattern 2:4 → 4:8, replaces a model pruned to 2:4 by sparsegpt; to keep it: --out OTHER"
    assert tune.replaces.startswith("the model it reads has changed, replaces a model tuned for 6 steps")
    assert re.match(r"dtype \w+ → float32, replaces", plans("model.dtype=float32")[0].replaces)


def test_many_changes_are_counted(at_finished: Path) -> None:
    changes = (
        "rank=2",
        "alpha=3",
        "weight_decay=0.5",
        "seed=4",
        "max_steps=9",
        "batch_size=2",
        "warmup_steps=1",
        "max_grad_norm=2",
    )
    said = plans(*(f"tune.{change}" for change in changes))[1].replaces
    assert "rank 4 → 2, alpha " in said
    assert "more settings, replaces" in said


def test_other_data_under_the_same_name(at_finished: Path) -> None:
    dataset = Path(tuned().data.dataset)
    dataset.write_text(dataset.read_text() * 2)
    assert plans()[1].replaces.startswith("the content of data.dataset has changed, replaces a model tuned for 6")


def test_another_version_of_the_code(at_finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lors_cli.pruning.stage.STAGE_VERSION", 99)
    assert plans()[0].replaces.startswith("this version of lors computes it otherwise, replaces a model pruned")


def test_a_record_of_an_earlier_version_names_what_it_can(at_finished: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        content["inputs"] = {key: content["inputs"][key] for key in ("model", "path")}
        del content["config"]["skip"], content["config"]["lr_schedule"]
        content["fingerprint"] = "0" * 32

    edit_record(RUN / "tune", older)
    assert plans()[1].replaces.startswith("its data or the version of lors changed, replaces a model tuned for 6 steps")
    assert plans("tune.rank=2")[1].replaces.startswith("rank 4 → 2, replaces")


def test_a_damaged_result_is_not_said_to_have_other_settings(at_finished: Path) -> None:
    (RUN / "tune" / "model.safetensors").unlink()
    assert plans()[1].replaces == "a file of the finished result was changed or removed; it is made anew"


def test_dropped_work_of_an_interrupted_run(at_finished: Path) -> None:
    config = tuned()
    record = records.read_record(RUN / "tune")
    assert record is not None
    made = {"config": replace(config, rank=8), "inputs": record.inputs}
    records.work_dir(RUN / "tune", "another", made)
    assert "drops" not in alone(replace(config, rank=2)).replaces, "nothing was done yet"
    (RUN / "tune/checkpoints/checkpoint-6").rename(RUN / "tune/checkpoints/checkpoint-40")
    (RUN / "tune/checkpoints/checkpoint-40/lors.json").write_text('{"fingerprint": "another"}')
    said = alone(replace(config, rank=2)).replaces
    assert said.startswith(
        "rank 4 → 2, replaces a model tuned for 6 steps; to keep it: --out OTHER; rank 8 → 2, drops "
    )
    assert said.endswith("what an interrupted run had done (up to step 40)")
    (RUN / "tune/stage.json").unlink()
    assert alone(replace(config, rank=2)).replaces.startswith(
        "rank 8 → 2, drops what an interrupted run had done (up to"
    )
    (RUN / "tune/.work/made.json").write_text("{}")
    assert alone(config).replaces.startswith("other settings, drops what an interrupted run had done")


def test_begun_blocks_of_other_settings(at_workshop: Path) -> None:
    work = RUN / "prune/.work"
    records.work_dir(RUN / "prune", "another")
    for index in range(3):
        (work / f"block_{index:04d}.json").write_text("{}")
    assert "drops what an interrupted run had done (3 blocks)" in plans()[0].replaces


def test_scores_that_are_only_added_to_replace_nothing(at_finished: Path) -> None:
    record = records.read_record(RUN / "eval")
    assert record is not None
    config: EvalConfig = stage_config("eval", record.config)
    models = {role: ModelConfig(path="dense" if role == "dense" else str(RUN / place), dtype="bfloat16")
              for role, place in (("dense", ""), ("pruned", "prune"), ("tuned", "tune"))}  # fmt: skip

    def said(**changes: Any) -> str:
        chosen = changes.pop("models", models)
        return plan_single("eval", replace(config, models=None, **changes), chosen, RUN / "eval", None).replaces

    assert said() == ""
    assert said(tasks=(*config.tasks, "boolq")) == ""
    assert said(limit=2).endswith("→ 2, replaces scores of dense, pruned, tuned; to keep it: --out OTHER")
    assert said(models={"dense": models["dense"]}).startswith(
        "pruned is not asked for, tuned is not asked for, replaces"
    )


def test_the_words_come_before_the_work_and_in_a_dry_run(at_finished: Path, lors: Lors) -> None:
    words = "rank 4 → 2, replaces a model tuned for 6 steps; to keep it: --out OTHER"
    dry = lors("run", "tiny.yaml", "tune.rank=2", "--dry-run")
    assert words in dry.stdout
    shown = json.loads(lors("run", "tiny.yaml", "tune.rank=2", "--dry-run", "--json").stdout)["stages"]
    assert shown[1]["detail"] == words
    result = lors("run", "tiny.yaml", "tune.rank=2", "--until", "tune")
    assert result.exit_code == 0
    said = result.stderr
    assert f"warning: tune: {words}" in said
    assert said.index(words) < said.index("[1/2] prune")
    assert said.count(words) == 1
    again = lors("run", "tiny.yaml", "tune.rank=2", "--until", "tune")
    assert "replaces" not in again.stderr
