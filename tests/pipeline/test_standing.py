"""What recipe.yaml, manifest.json and the report say is of the stages that lie there, whatever was asked since."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forking import signalled
from typer.testing import Result

from lors_cli.files import records
from lors_cli.models.sources import model_fingerprint
from lors_cli.pipeline.cards import made_card
from lors_cli.pipeline.standing import standing_stages
from lors_cli.recipe.schema import ModelConfig

Lors = Callable[..., Result]
RUN = Path("runs/tiny")
SPOKEN = ("recipe.yaml", "report.md", "report.html", "report.csv", "report.tex")


def said() -> dict[str, Any]:
    """All that the run folder says of its stages; of the manifest all but what the last call was."""
    manifest = json.loads((RUN / "manifest.json").read_text())
    del manifest["last_call"]
    return {"manifest": manifest, **{name: (RUN / name).read_bytes() for name in SPOKEN}}


def ranks() -> tuple[int, int, int]:
    """The rank that the recipe names, that the manifest names, and that the tuned model has."""
    manifest = json.loads((RUN / "manifest.json").read_text())
    adapter = json.loads((RUN / "tune" / "adapter" / "adapter_config.json").read_text())
    recipe = yaml.safe_load((RUN / "recipe.yaml").read_text())
    return recipe["tune"]["rank"], manifest["recipe"]["tune"]["rank"], adapter["r"]


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["tune.rank=8", "tune.max_steps=3", "--until", "prune"], 0),  # as in the report of the fault
        (["name=other", "seed=1", "prune.calibration.seed=0", "eval.limit=1", "--until", "prune"], 0),
        (["tune.method=spp", "tune.rank=5"], 2),  # 5 divides no layer's outputs
        (["model.path=gone/away/x"], 3),
        (["tune.data.dataset=gone.jsonl"], 3),
    ],
)
def test_a_call_that_does_nothing_or_fails_changes_nothing(
    at_finished: Path, lors: Lors, arguments: list[str], exit_code: int
) -> None:
    before = said()
    result = lors("run", "tiny.yaml", "--out", RUN, *arguments)
    assert result.exit_code == exit_code, result.output
    assert said() == before
    assert ranks() == (4, 4, 4)
    assert lors("report", RUN).exit_code == 0
    assert said() == before
    again = json.loads(lors("run", "--from-manifest", RUN, "--dry-run", "--json").stdout)
    assert [stage["stage"] for stage in again["stages"]] == ["prune", "tune", "eval"]
    assert "lors rank 4" in again["stages"][1]["what"]


def test_an_interrupted_run_with_another_setting_changes_nothing(at_finished: Path, lors: Lors) -> None:
    before = said()
    result = signalled(signal.SIGINT, "checkpoint-4", "run", "tiny.yaml", "tune.rank=8")
    assert result.returncode == 130, result.stderr
    assert said() == before
    assert lors("run", "tiny.yaml", "--until", "tune").exit_code == 0
    assert said() == before


def test_a_text_that_has_changed_since_does_not_take_its_stage_away(at_finished: Path, lors: Lors) -> None:
    before = said()
    with open("rows.jsonl", "a") as file:
        file.write('{"instruction": "one", "input": "", "output": "more"}\n')
    assert lors("run", "tiny.yaml", "--until", "prune").exit_code == 0
    assert lors("report", RUN).exit_code == 0
    assert said() == before
    assert "tune: rows.jsonl was jsonl#2:" in lors("run", "--from-manifest", RUN, "--dry-run").stderr


def test_a_run_that_fails_after_tuning_speaks_of_the_new_model_and_of_no_old_scores(
    at_finished: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.errors import ResourceError
    from lors_cli.evaluation import stage as evaluation

    def refuse(*_: Any, **__: Any) -> None:
        raise ResourceError("no room")

    monkeypatch.setattr(evaluation, "_score_model", refuse)
    assert lors("run", "tiny.yaml", "tune.rank=2", "model.device=cpu").exit_code == 4
    assert ranks() == (2, 2, 2)
    manifest = json.loads((RUN / "manifest.json").read_text())
    assert [entry["stage"] for entry in manifest["stages"]] == ["prune", "tune"]
    assert manifest["recipe"]["model"]["device"] == "cpu"
    assert "eval" not in manifest["recipe"]
    report = (RUN / "report.md").read_text()
    assert "at rank 2" in report
    assert "## Results" not in report


def test_a_first_run_that_is_interrupted_goes_on_from_its_own_recipe(at_workshop: Path, lors: Lors) -> None:
    assert lors("run", "tiny.yaml", "--until", "prune").exit_code == 0
    assert signalled(signal.SIGINT, "checkpoint-4", "run", "tiny.yaml", "tune.rank=2").returncode == 130
    lors("run", "tiny.yaml", "--until", "prune")  # does nothing
    plan = json.loads(lors("run", RUN / "recipe.yaml", "--dry-run", "--json").stdout)["stages"]
    assert [stage["status"] for stage in plan] == ["done", "resume", "run"]
    assert "rank 2" in plan[1]["what"]


def test_what_an_earlier_version_damaged_is_mended(at_finished: Path, lors: Lors) -> None:
    before = said()
    text = (RUN / "recipe.yaml").read_text()
    (RUN / "recipe.yaml").write_text(text.replace("rank: 4", "rank: 8"))
    manifest = json.loads((RUN / "manifest.json").read_text())
    manifest["recipe"]["tune"]["rank"] = 8
    (RUN / "manifest.json").write_text(json.dumps(manifest))
    assert lors("run", "tiny.yaml", "--until", "prune").exit_code == 0
    assert said() == before


def change(stage: str, **changes: Any) -> None:
    path = RUN / stage / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_stages_that_stand_are_made_from_one_another(at_finished: Path) -> None:
    assert list(standing_stages(RUN)) == ["prune", "tune", "eval"]
    kept = {stage: records.read_record(RUN / stage) for stage in ("prune", "tune")}
    assert kept["prune"]
    assert kept["tune"]
    change("prune", fingerprint="another")
    assert list(standing_stages(RUN)) == ["prune"]
    change("tune", inputs={**kept["tune"].inputs, "path": "dense"})  # tuned from a model that is there still
    assert list(standing_stages(RUN)) == ["tune", "eval"]
    change("prune", fingerprint=kept["prune"].fingerprint)
    change("tune", fingerprint="another", inputs=kept["tune"].inputs)
    assert list(standing_stages(RUN)) == ["prune", "tune"]
    shutil.rmtree(RUN / "tune")  # to save room: its scores are kept
    assert list(standing_stages(RUN)) == ["prune", "eval"]
    (RUN / "prune" / "model.safetensors").write_bytes(b"")
    assert list(standing_stages(RUN)) == ["eval"]


def test_a_file_put_beside_a_model_takes_no_later_stage_away(at_finished: Path, lors: Lors) -> None:
    for stage in ("prune", "tune"):
        (RUN / stage / "tokenizer.model").touch()
    pruned, tuned = (model_fingerprint(ModelConfig(path=str(RUN / stage))) for stage in ("prune", "tune"))
    assert pruned.startswith("folder:")
    kept = {stage: records.read_record(RUN / stage) for stage in ("tune", "eval")}
    assert kept["tune"]
    assert kept["eval"]
    change("tune", inputs={**kept["tune"].inputs, "model": pruned})
    change("eval", inputs={**kept["eval"].inputs, "pruned": pruned, "tuned": tuned})
    assert lors("pack", RUN / "tune", "--out", RUN / "pack").exit_code == 0
    standing = standing_stages(RUN)
    assert list(standing) == ["prune", "tune", "pack", "eval"]
    for stage in ("tune", "pack"):
        card = made_card(RUN / stage, standing[stage], "me/mine", None)["README.md"]
        assert isinstance(card, bytes)
        assert b"| task | dense | pruned" in card
    (RUN / "tune" / "tokenizer.model").write_text("another")
    assert list(standing_stages(RUN)) == ["prune", "tune"]


def test_every_default_is_filled_in_wherever_settings_are_said(at_finished: Path, lors: Lors) -> None:
    implied = {
        "prune": {"true_sequential": False, "sparsity": 0.5},
        "tune": {"init": "gradient", "rounding": "stochastic", "data": {"packing": "separate"}},
    }
    stored = yaml.safe_load((RUN / "recipe.yaml").read_text())
    manifest = json.loads((RUN / "manifest.json").read_text())["recipe"]
    report, card = (RUN / "report.md").read_text(), (RUN / "tune" / "README.md").read_text()
    (made,) = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", card, re.DOTALL))
    for stage, settings in implied.items():
        record = json.loads((RUN / stage / "stage.json").read_text())["config"]
        for key, value in settings.items():
            if isinstance(value, dict):
                assert all(
                    place["data"]["packing"] == "separate"
                    for place in (stored[stage], manifest[stage], record, made[stage])
                )
                assert "packing: separate" in report
                continue
            assert stored[stage][key] == manifest[stage][key] == record[key] == made[stage][key] == value
            assert f"{key}: {str(value).lower()}" in report
    calibrated = json.loads((RUN / "prune" / "stage.json").read_text())["metrics"]["calibration"]
    assert calibrated.pop("source").startswith("jsonl#2:")
    assert calibrated == {"num_samples": 8, "tokens": 256, "sequence_length": 32}
    result = json.loads(lors("run", RUN / "recipe.yaml", "--json").stdout)  # what is filled in changes no fingerprint
    assert [stage["status"] for stage in result["stages"]] == ["skipped"] * 3
