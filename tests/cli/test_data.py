"""`lors data show`: samples as the model will see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lors_cli.cli.data import styled_text, texts_of
from lors_cli.data.prompts import TEMPLATES

alpaca_prompt = TEMPLATES["alpaca"].prompt

Lors = Callable[..., Result]


def test_a_recipes_samples_with_their_masked_part_marked(at_workshop: Path, lors: Lors) -> None:
    result = lors("data", "show", "tiny.yaml", "--num", 2)
    assert result.exit_code == 0
    for number in range(2):
        assert f"⟦{alpaca_prompt(f'say {number}')}⟧it is {number * 7 % 10}</s>" in result.stdout
    assert "say 2" not in result.stdout
    assert "rows.jsonl: 40 samples" in result.stdout


def test_json_has_tokens_labels_and_figures(at_workshop: Path, lors: Lors) -> None:
    result = lors("data", "show", "tiny.yaml", "tune.data.train_on_prompt=true", "--num", 1, "--json")
    document = json.loads(result.stdout)
    (sample,) = document["samples"]
    text = alpaca_prompt("say 0") + "it is 0"
    assert sample["input_ids"] == sample["labels"] == [*text.encode(), 257]
    assert sample["text"] == text + "</s>"
    lengths = [len(alpaca_prompt(f"say {number}")) + 8 for number in range(40)]
    assert document["num_tokens"] == sum(lengths)
    assert document["num_labels"] == sum(lengths) - 40  # the first token is predicted by nothing
    assert document["lengths"] == {"min": min(lengths), "median": sorted(lengths)[19], "max": max(lengths)}
    assert document["label_share"] == pytest.approx(1 - 40 / sum(lengths), abs=1e-4)
    assert document["skipped"] == {"empty output": 0, "no label after truncation": 0}


def test_a_tune_config_needs_a_model(at_workshop: Path, lors: Lors) -> None:
    Path("tune.yaml").write_text("data: {dataset: rows.jsonl, template: alpaca_short}\n")
    result = lors("data", "show", "tune.yaml")
    assert (result.exit_code, "--model MODEL" in result.stderr) == (2, True)
    result = lors("data", "show", "tune.yaml", "data.packing=isolated", "--model", "dense", "--num", 1)
    assert result.exit_code == 0
    assert "texts · " in result.stdout
    assert result.stdout.count("⟦### Instruction:\nsay ") > 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tinyy.yaml"], 2, "There is no recipe 'tinyy.yaml'"),
        (["tune/lors-alpacca"], 2, "Tune configs: tune/lors-alpaca"),
        (["tiny.yaml", "tune.data.templat=chat"], 2, "did you mean tune.data.template?"),
        (["tiny.yaml", "tune.data.template=chat"], 2, "this one has none"),
        (["tiny.yaml", "tune.data.dataset=nowhere.jsonl"], 3, "No file nowhere.jsonl"),
        (["dense.yaml"], 2, "has no tune stage"),
    ],
)
def test_mistakes(at_workshop: Path, lors: Lors, arguments: list[str], code: int, message: str) -> None:
    Path("dense.yaml").write_text("name: dense\nmodel: {path: dense}\neval: {tasks: [pydoc_choice]}\n")
    result = lors("data", "show", *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_styles_dim_what_has_no_label_and_colour_special_tokens(tiny_tokenizer: Any) -> None:
    sample = {"input_ids": [256, *"né".encode(), *b"yes", 257], "labels": [-100] * 4 + [*b"yes", 257]}
    text = styled_text(sample, tiny_tokenizer, marks=False)
    assert text.plain == "<s>néyes</s>"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles == {"<s>": "dim bold cyan", "né": "dim", "</s>": "bold cyan"}
    assert styled_text(sample, tiny_tokenizer, marks=True).plain == "⟦<s>né⟧yes</s>"


def test_texts_of_an_isolated_sample() -> None:
    sample = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5], "position_ids": [0, 1, 0, 1, 2]}
    assert [text["input_ids"] for text in texts_of(sample)] == [[1, 2], [3, 4, 5]]
    del sample["position_ids"]
    assert texts_of(sample) == [sample]
