"""Short texts beside the scores: what they say, when they are made anew, and that scores do not depend on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from lors_cli.evaluation import texts
from lors_cli.evaluation.pieces import eval_fingerprint
from lors_cli.evaluation.stage import evaluate
from lors_cli.evaluation.texts import NEW_TOKENS, PROMPTS, lacking_texts, read_texts, take_over_texts
from lors_cli.files.records import read_record
from lors_cli.pipeline.plans import plan_single
from lors_cli.recipe.schema import EvalConfig, ModelConfig

CONFIG = EvalConfig(tasks=(), perplexity=("text.jsonl",), perplexity_length=32, perplexity_windows=1)
MODELS = {"dense": ModelConfig(path="dense", device="cpu")}
OUT = Path("e")


def test_texts_of_a_run_are_those_that_generate_gives(lors: Callable[..., Result], at_finished: Path) -> None:
    folder = Path("runs/tiny")
    tuned = json.loads((folder / "eval/texts/tuned.json").read_text())
    assert tuned["format"] == "alpaca"
    assert [each["prompt"] for each in tuned["texts"]] == list(PROMPTS)
    assert all(0 < each["tokens"] <= NEW_TOKENS for each in tuned["texts"])
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    shown = lors("generate", folder / "tune", *prompts, "--max-new-tokens", NEW_TOKENS, "--json")
    assert [each["text"] for each in json.loads(shown.stdout)["tune"]] == [each["text"] for each in tuned["texts"]]
    assert {"dense.json", "pruned.json", "tuned.json"} == {path.name for path in (folder / "eval/texts").iterdir()}
    assert "texts/tuned.json" in read_record(folder / "eval").files  # type: ignore[union-attr]
    report = (folder / "report.md").read_text()
    assert "## Texts" in report
    assert f"**{PROMPTS[0]}**" in report
    assert "tuned alpaca" in report


def test_scores_have_the_same_fingerprint_with_and_without(at_workshop: Path) -> None:
    prints = {"dense": "model:0"}
    off = replace(CONFIG, generations=False)
    assert eval_fingerprint(CONFIG, prints, None) == eval_fingerprint(off, prints, None)


def test_killed_between_scores_and_texts_only_the_texts_are_done(
    at_workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lors_cli.models.generation.generate_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(CONFIG, MODELS, OUT, data_dir=None)
    assert read_record(OUT) is None
    plan = plan_single("eval", CONFIG, MODELS, OUT, None)
    assert (plan.status, plan.detail) == ("resume", "short texts of dense to do")
    monkeypatch.setattr("lors_cli.evaluation.perplexity.token_perplexity", interrupt)  # measured before
    evaluate(CONFIG, MODELS, OUT, data_dir=None)
    assert plan_single("eval", CONFIG, MODELS, OUT, None).status == "done"
    found = read_texts(OUT / "texts" / "dense.json")
    assert found is not None
    assert len(found["texts"]) == 3


def test_setting_acts_on_a_finished_evaluation_and_takes_its_files_away(at_workshop: Path) -> None:
    off = replace(CONFIG, generations=False)
    evaluate(off, MODELS, OUT, data_dir=None)
    assert not (OUT / "texts").exists()
    assert plan_single("eval", off, MODELS, OUT, None).status == "done"
    assert plan_single("eval", CONFIG, MODELS, OUT, None).status == "resume"
    evaluate(CONFIG, MODELS, OUT, data_dir=None)
    assert (OUT / "texts" / "dense.json").is_file()
    evaluate(off, MODELS, OUT, data_dir=None)
    assert not (OUT / "texts" / "dense.json").exists()


def test_prompts_without_room_leave_scores_and_say_why(at_workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lors_cli.models.generation.model_max_length", lambda model: 8)
    results = evaluate(CONFIG, MODELS, OUT, data_dir=None)
    assert results["dense"]["perplexity"]["text.jsonl"]["value"] > 0
    content = json.loads((OUT / "texts" / "dense.json").read_text())
    assert content["texts"] == []
    assert "the model takes 8" in content["reason"]
    assert plan_single("eval", CONFIG, MODELS, OUT, None).status == "done"


def test_texts_of_another_model_or_a_torn_file_are_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "texts" / "dense.json"
    path.parent.mkdir()
    good = {"fingerprint": texts.texts_fingerprint("model:0"), "format": "plain", "texts": []}
    for content, lacks in (
        (json.dumps(good), False), (json.dumps({**good, "fingerprint": "x"}), True), ("{", True), ("[]", True),
        (json.dumps({**good, "texts": [{"prompt": 3}]}), True),
    ):  # fmt: skip
        path.write_text(content)
        assert bool(lacking_texts(CONFIG, {"dense": "model:0"}, tmp_path)) is lacks, content


def test_other_evaluations_lend_texts_of_the_same_model(tmp_path: Path) -> None:
    good = {"fingerprint": texts.texts_fingerprint("model:0"), "format": "plain", "texts": []}
    for name in ("a", "b"):
        (tmp_path / name / "texts").mkdir(parents=True)
    (tmp_path / "b/texts/dense.json").write_text(json.dumps(good))
    take_over_texts(CONFIG, {"dense": "model:0"}, tmp_path / "new", [tmp_path / "a", tmp_path / "b"])
    assert read_texts(tmp_path / "new/texts/dense.json") == good
    take_over_texts(CONFIG, {"dense": "model:1"}, tmp_path / "other", [tmp_path / "b"])
    assert not (tmp_path / "other").exists()
