"""Prompts as models know them: held against the samples of training, which begin with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import byte_tokenizer

from lors_cli.data.asked import PromptFormat, end_tokens, prompt_format, prompt_tokens, question, read_prompts, shown
from lors_cli.data.instructions import instruction_samples
from lors_cli.data.sources import open_source
from lors_cli.errors import LorsError, MissingError, UsageError
from lors_cli.files.records import StageRecord
from lors_cli.recipe.schema import TuneDataConfig

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(4096)


@pytest.fixture
def chatty() -> Any:
    made = byte_tokenizer(4096)
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize("template", ["alpaca", "alpaca_short", "vicuna", "chat"])
@pytest.mark.parametrize("row", [("Say {it}.", ""), ("Say it.", "to me")])
def test_prompt_is_what_samples_of_training_begin_with(
    template: Any, row: tuple[str, str], chatty: Any, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": row[0], "input": row[1], "output": "yes"}) + "\n")
    config = TuneDataConfig(dataset=str(file), template=template, max_length=2048)
    source = open_source(str(file), split="train", data_dir=None, want="instructions")
    sample = instruction_samples(source, config, chatty).samples[0]
    asked = prompt_tokens(PromptFormat(template, ""), question(*row), chatty)
    first = next(place for place, label in enumerate(sample["labels"]) if label != -100)
    assert asked == sample["input_ids"][:first]


def test_plain_prompt_is_what_the_tokenizer_makes_of_the_text(tokenizer: Any) -> None:
    assert prompt_tokens(PromptFormat("plain", ""), question("Once"), tokenizer) == tokenizer("Once").input_ids


def test_end_of_a_chat_s_turn_ends_an_answer(tokenizer: Any) -> None:
    from transformers import AddedToken

    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", special=True)]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    chat = end_tokens(PromptFormat("chat", ""), tokenizer, 5)
    assert chat == [tokenizer.eos_token_id, 5, turn]
    assert end_tokens(PromptFormat("alpaca", ""), tokenizer, [5, 6]) == [tokenizer.eos_token_id, 5, 6]
    assert end_tokens(PromptFormat("plain", ""), tokenizer, None) == [tokenizer.eos_token_id]


def record(folder: Path, stage: str = "tune", **metrics: Any) -> Path:
    """A folder with the record of a stage."""
    folder.mkdir()
    content = StageRecord(stage, "0", {"data": {"template": "alpaca"}}, {}, metrics, {}, 1.0, {})
    (folder / "stage.json").write_text(json.dumps(content.__dict__))
    return folder


def test_tuned_model_is_asked_as_it_was_tuned(tmp_path: Path, chatty: Any) -> None:
    of_rows = {"empty output": 0, "no label after truncation": 0}
    on_rows = record(tmp_path / "rows", prompt={"format": "alpaca_short", "ends_with": "</s>"}, skipped=of_rows)
    assert prompt_format(on_rows, chatty) == PromptFormat("alpaca_short", "which it was tuned with")
    on_text = record(tmp_path / "text", skipped=of_rows)  # as it is counted
    assert prompt_format(on_text, chatty).name == "chat"
    pruned = record(tmp_path / "pruned", stage="prune")
    assert prompt_format(pruned, chatty).name == "chat"


def test_other_models_are_asked_in_their_chat_template_or_plainly(tokenizer: Any, chatty: Any, tmp_path: Path) -> None:
    assert prompt_format(None, chatty).name == "chat"
    assert prompt_format(tmp_path, tokenizer).name == "plain"


def test_wanted_prompt_outranks_all_and_an_impossible_one_is_refused(
    tmp_path: Path, tokenizer: Any, chatty: Any
) -> None:
    tuned = record(tmp_path / "tuned", prompt={"format": "alpaca"})
    assert prompt_format(tuned, chatty, "chat").name == "chat"
    assert prompt_format(tuned, chatty, "plain").name == "plain"
    with pytest.raises(UsageError, match="alpca is none of") as caught:
        prompt_format(tuned, chatty, "alpca")
    assert caught.value.hint == "Did you mean alpaca?"
    with pytest.raises(UsageError, match="has no chat template"):
        prompt_format(tuned, tokenizer, "chat")


ROWS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Why?"}, "Why?"),
    ({"prompt": "Why?", "completion": "So."}, "Why?"),
    ({"question": "Why?"}, "Why?"),
    ({"text": "Once"}, "Once"),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2"),
    ({"prompt": [{"role": "user", "content": "Why?"}]}, "Why?"),
    ({"messages": [{"role": "user", "content": "Why?"}]}, "Why?"),
    ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}, "Why?"),
    ({"conversations": [{"from": "human", "value": "Why?"}]}, "Why?"),
    ({"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
                   {"role": "user", "content": "C"}]}, "A\n\nB\n\nC"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked"), ROWS, ids=[str(list(row)) + str(n) for n, (row, _) in enumerate(ROWS)])
def test_rows_of_a_file_are_read_without_their_answer(row: dict[str, Any], asked: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (found,) = read_prompts(file)
    assert shown(found) == asked


def test_conversation_is_rendered_up_to_its_next_answer(tmp_path: Path, chatty: Any) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(ROWS[-1][0]) + "\n")
    tokens = prompt_tokens(PromptFormat("chat", ""), read_prompts(file)[0], chatty)
    assert chatty.decode(tokens) == "<|user|>A\n<|assistant|>B\n<|user|>C\n<|assistant|>"
    with pytest.raises(UsageError, match="does not fit the prompt alpaca"):
        prompt_tokens(PromptFormat("alpaca", ""), read_prompts(file)[0], chatty)


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One?\n\n  Two?\r\n")
    assert [shown(row) for row in read_prompts(tmp_path / "p.txt")] == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n", "is empty"),
        ("p.jsonl", "[]", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"quesion": "b"}\n', "p.jsonl:2: a row must have one of"),
        ("p.jsonl", '{"prompt": "a", "question": "b"}\n', "p.jsonl:1: prompt and question are prompts both"),
        ("p.jsonl", '{"prompt": 5}\n', "p.jsonl:1: 'prompt' must be text"),
        ("p.jsonl", '"a"\n', "p.jsonl:1: a row must be an object"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "B"}]}\n', "p.jsonl:1: there is nothing to answer"),
        ("p.jsonl", '{"messages": []}\n', "p.jsonl:1: there is nothing to answer"),
        ("p.jsonl", '{"messages": "hi"}\n', "p.jsonl:1: 'messages' must be a list of turns"),
        ("p.doc", "Why?", "no known format"),
        ("p.safetensors", "Why?", "no file of prompts"),
    ],
)
def test_files_that_ask_nothing_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LorsError, match=message):
        read_prompts(tmp_path / name)


def test_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"There is no file .*p\.txt"):
        read_prompts(tmp_path / "p.txt")
