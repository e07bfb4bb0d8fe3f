"""What the arguments of `lors eval` are read as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lors_cli.cli.labels import named_models, read_arguments, reading
from lors_cli.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, `tuned`, and one without, `texts`."""
    folder = tmp_path / "workshop"
    (folder / "tuned").mkdir(parents=True)
    (folder / "tuned/config.json").write_text("{}")
    (folder / "texts").mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_model_labels(here: Path) -> None:
    assert named_models(["tuned", "./tuned", "org/name", "package://m/x.Q4_1.gguf"]) == {
        "tuned": "tuned", "tuned-2": "./tuned", "name": "org/name", "x.Q4_1": "package://m/x.Q4_1.gguf",
    }  # fmt: skip
    assert list(named_models([".", "a b/c d", "x/stage", "y/.hidden"])) == [
        "workshop", "c_d", "stage-model", "hidden",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no model"):
        named_models([])


def test_names_keep_the_order_and_are_no_others(here: Path) -> None:
    arguments = ["org/tuned", "limit=3", "base=org/model", "tuned=./tuned", "v1.2-x=other.gguf", "tasks=[rte]"]
    models, settings = read_arguments(arguments)
    assert list(models.items()) == [
        ("tuned-2", "org/tuned"), ("base", "org/model"), ("tuned", "./tuned"), ("v1.2-x", "other.gguf"),
    ]  # fmt: skip
    assert settings == ["limit=3", "tasks=[rte]"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("limit=3", "setting"), ("perplexity_length=64", "setting"), ("perplexity=texts", "setting"),
        ("limt=3", "setting"), ("task=arc_easy", "setting"), ("foo=3", "setting"), ("foo=[a]", "setting"),
        ("num_fewshot.mmlu=5", "setting"), ("runs/a=b", "model"), ("dense", "model"), ("base=org/model", "named"),
        ("base=tuned", "named"), ("limits=tuned", "named"), ("x=texts", "named"), ("mine=~/sparse", "named"),
        ("base=package://m/x.gguf", "named"), ("my-model=./nothing", "named"),
    ],
)  # fmt: skip
def test_readings(here: Path, argument: str, expected: str) -> None:
    assert reading(argument) == expected


def test_a_folder_of_such_a_name_is_a_model(here: Path) -> None:
    Path("a=b").mkdir()
    assert reading("a=b") == "model"


@pytest.mark.parametrize("argument", ["perplexty=data/text", "include_pth=texts", "base=gpt2", "device=cuda"])
def test_two_readings_are_refused_with_both(here: Path, argument: str) -> None:
    with pytest.raises(UsageError, match="two ways") as caught:
        reading(argument)
    assert "As a setting" in caught.value.message
    assert "As a name" in caught.value.message


@pytest.mark.parametrize("arguments", [["a=tuned", "a=org/x"], ["stage=tuned"], ["a b=tuned"], [".x=tuned"]])
def test_names_that_no_two_files_can_have(here: Path, arguments: list[str]) -> None:
    with pytest.raises(UsageError, match=r"names two models|cannot be a model's name"):
        read_arguments(arguments)


def test_named_models_in_table_and_files(at_workshop: Path, lors: Any) -> None:
    result = lors("eval", "base=dense", "mine=./dense", "perplexity=[text.jsonl]", "perplexity_length=16",
                  "perplexity_windows=2", "--tasks", "", "--out", "scores")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("scores").glob("*.json")} == {"base.json", "mine.json", "stage.json"}
    assert result.stdout.splitlines()[0].split()[:3] == ["task", "base", "mine"]


def test_a_mistyped_setting_is_told_as_one(at_workshop: Path, lors: Any) -> None:
    result = lors("eval", "dense", "limt=3")
    assert result.exit_code == 2
    assert "did you mean limit?" in result.stderr


def test_a_missing_chat_template_is_said_before_anything_runs(at_workshop: Path, lors: Any) -> None:
    result = lors("eval", "dense", "--tasks", "pydoc_choice", "--apply-chat-template", "--dry-run")
    assert result.exit_code == 2
    assert "has no chat template" in result.stderr
    asked = "tune.data.template=chat", "eval.apply_chat_template=true"
    for number, said in enumerate(("needs the tokenizer's chat template", "dense has no chat template")):
        result = lors("run", "tiny.yaml", asked[number], "--dry-run")
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.split())
    own = lors("run", "tiny.yaml", asked[1], "eval.models=[tuned]", "--dry-run")
    assert own.exit_code == 0, "tuning on instructions gives the model their template"
    text = lors("run", "tiny.yaml", asked[1], "eval.models=[tuned]", "tune.data.dataset=text.jsonl", "--dry-run")
    assert text.exit_code == 2
