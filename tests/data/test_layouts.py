"""Row layouts: each read as what it is, what is ambiguous refused with file and row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lors_cli.data.prompts import Turn
from lors_cli.data.sources import TextSource, fingerprint_source, open_source
from lors_cli.data.tokens import tuning_samples
from lors_cli.errors import UsageError
from lors_cli.output import console
from lors_cli.recipe.schema import ColumnsConfig, TuneDataConfig


def _open(folder: Path, rows: list[Any], name: str = "a.jsonl", **columns: str) -> TextSource:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(path), split="train", data_dir=None, want="instructions",
                       columns=ColumnsConfig(**columns) if columns else None)  # fmt: skip


def _turns(*texts: str, system: str = "") -> dict[str, list[Turn]]:
    """Texts of user and assistant in turn."""
    talk = [Turn("assistant", text, learnt=True) if number % 2 else Turn("user", text)
            for number, text in enumerate(texts)]  # fmt: skip
    return {"messages": [Turn("system", system), *talk] if system else talk}


PLAIN = {"instruction": "Q", "input": "", "output": "A"}
OPENAI = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("row", "layout", "expected"),
    [
        ({"messages": OPENAI, "id": 7}, "messages", _turns("Q", "A")),
        ({"messages": [{"role": "system", "content": "S"}, *OPENAI], "prompt": "Q"}, "messages",
         _turns("Q", "A", system="S")),
        ({"messages": [*OPENAI, {"role": "user", "content": "never answered"}]}, "messages", _turns("Q", "A")),
        ({"messages": [{**OPENAI[0]}, {**OPENAI[1], "weight": 0}, *OPENAI]}, "messages",
         {"messages": [Turn("user", "Q"), Turn("assistant", "A"), *_turns("Q", "A")["messages"]]}),
        ({"conversations": SHAREGPT * 2}, "conversations", _turns("Q", "A", "Q", "A")),
        ({"conversations": SHAREGPT, "system": "S"}, "conversations", _turns("Q", "A", system="S")),
        ({"prompt": "Q", "completion": "A"}, "prompt/completion", PLAIN),
        ({"prompt": OPENAI, "completion": [{"role": "assistant", "content": "B"}]}, "prompt/completion",
         {"messages": [Turn("user", "Q"), Turn("assistant", "A"), Turn("assistant", "B", learnt=True)]}),
        ({"prompt": OPENAI[:1], "completion": OPENAI[1:], "system": "S"}, "prompt/completion",
         _turns("Q", "A", system="S")),
        ({"instruction": "Q", "response": "A"}, "instruction/response", PLAIN),
        ({"instruction": "Q", "context": "C", "response": "A", "category": "x"}, "instruction/response",
         {**PLAIN, "input": "C"}),
        ({"question": "Q", "answer": "A"}, "question/answer", PLAIN),
        ({"conversation": [{"human": "Q", "assistant": "A"}] * 2, "id": 1}, "conversation", _turns("Q", "A", "Q", "A")),
        ({"conversation": [{"input": "Q", "output": "A"}], "source": "x"}, "conversation", _turns("Q", "A")),
        ({"id": "t0.1", "system_prompt": "S", "question": "Q", "response": "A"}, "question/response",  # OpenOrca
         _turns("Q", "A", system="S")),
        ({"id": "t0.2", "system_prompt": "", "question": "Q", "response": "A"}, "question/response", PLAIN),
        ({"type": "GSM", "query": "Q", "response": "A", "original_question": "x"}, "query/response", PLAIN),  # MetaMath
        ({"inputs": "Q", "targets": "A", "task": "x"}, "inputs/targets", PLAIN),  # FLAN
        ({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, "messages", _turns("Q", "A")),
        ({"messages": OPENAI, "chosen": OPENAI, "rejected": OPENAI}, "messages", _turns("Q", "A")),  # UltraFeedback
        ({"instruction": "Q", "input": None, "output": "A", "system": "", "history": []}, "instruction/output", PLAIN),
        ({"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]]},
         "instruction/output", _turns("q", "a", "Q\nI", "A", system="S")),
        ({"instruction": "Q", "input": "", "context": "C", "output": "A"}, "instruction/output",
         {**PLAIN, "input": "C"}),
        ({"instruction": "Q", "input": "", "context": ["C"], "output": "A"}, "instruction/output", PLAIN),
        ({"question": "Q", "response": "A", "system": "", "system_prompt": "S"}, "question/response",
         _turns("Q", "A", system="S")),
        ({"prompt": "Q", "completion": "A", "input": "unrelated", "history": 1990}, "prompt/completion", PLAIN),
        ({"question": "Q", "answer": "A", "context": {"title": ["T"]}}, "question/answer", PLAIN),  # HotpotQA
        ({"question": "Q", "answer": None, "id": 1}, "question/answer", {**PLAIN, "output": ""}),
        ({"prompt": OPENAI[:1], "completion": None}, "prompt/completion", {"messages": [Turn("user", "Q")]}),
        ({"conversation": [{"human": "Q", "assistant": None}]}, "conversation", _turns("Q", "")),
        ({"messages": [OPENAI[0], {**OPENAI[1], "content": None}, *OPENAI]}, "messages", _turns("Q", "", "Q", "A")),
    ],
)  # fmt: skip
def test_layouts(tmp_path: Path, row: dict[str, Any], layout: str, expected: dict[str, Any]) -> None:
    source = _open(tmp_path, [row])
    assert (source.kind, source.layout) == ("instructions", layout)
    assert list(source.rows()) == [expected]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "Q", "reply": "A"}],
         r"a.jsonl:1: .*neither text nor an .*: it has 'query', 'reply'.*\n.*instruction: query, output: reply"),
        ([{"story": "Q"}], r"it has 'story'.*\n.*columns: {text: story}"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}],
         r"a.jsonl:1: .* a pair of preferences.*'rejected'.\n.*columns: {instruction: prompt, output: chosen}"),
        ([{"chosen": OPENAI, "rejected": OPENAI}], r"pair of preferences.*\n.*columns: {messages: chosen}"),
        ([{"message_id": "1", "parent_id": None, "text": "T", "role": "prompter"}],
         r"one message of a tree, as OpenAssistant.*\n.*columns: {text: text}"),
        ([{"text": "T", "label": 1}], r"text with a label.*\n.*columns: {text: text}"),
        ([{"input": "Q", "output": "A"}], r"neither text nor an .*\n.*columns: {instruction: input, output: output}"),
        ([{"id": 3, "user_query": "Q", "bot_answer": "A"}], r"columns: {instruction: user_query, output: bot_answer}"),
        ([{"conversation": [{"human": None, "assistant": "A"}]}], "the human of turn 1 of 'conversation' must be"),
        ([{"instruction": None, "output": "A"}], "a.jsonl:1: 'instruction' is null, and the first row says"),
        ([{"text": None}], "a.jsonl:1: 'text' is null, and the first row says"),
        ([PLAIN, {**PLAIN, "output": None, "response": "A"}],
         "a.jsonl:2: this row is instruction/response, while rows before it were read as instruction/output"),
        ([{"messages": {"role": ["user", "assistant"], "content": ["Q"]}}], "'messages' must be a list of turns"),
        ([{"messages": [{"role": "assistant", "text": "A"}]}], "the content of turn 1 of 'messages' must be text"),
        ([{**PLAIN, "history": True}], r"'history' must be a list of \[.*, not true.\n.*with columns"),
        ([{"instruction": "Q", "output": "A", "context": [1]}], r"'context' must be text, not \[1\].\n.*with columns"),
        ([{**PLAIN, "input": {"a": 1}}], r"'input' must be text, not {\"a\": 1}.\n.*with columns"),
        ([{"prompt": "Q", "completion": "A", "messages": OPENAI}], "both messages and prompt/completion"),
        ([{"instruction": "Q", "output": "A", "response": "B"}], "both instruction/output and instruction/response"),
        ([{"text": "T"}, {"text": "T", **PLAIN}], "a.jsonl:2: this row is instruction/output, while .* read as text"),
        ([PLAIN, {"question": "Q", "answer": "A"}], "a.jsonl:2: the row has no 'instruction'; it has 'question'"),
        ([{"messages": OPENAI}, {"messages": "hi"}], "a.jsonl:2: 'messages' must be a list of turns, not \"hi\""),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "a.jsonl:1: turn 1 of 'messages' has the role 'tool'"),
        ([{"messages": [{"role": "user"}]}], "the content of turn 1 of 'messages' must be text, not null"),
        ([{"messages": [{**OPENAI[1], "tool_calls": [1]}]}], "has calls of tools"),
        ([{"conversations": ["hi"]}], "turn 1 of 'conversations' must have role and content, or from and value"),
        ([{**PLAIN, "history": ["q"]}], r"'history' must be a list of \[question, answer\]"),
        ([{**PLAIN, "system": 3}], "'system' must be text, not 3"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(_open(tmp_path, rows).rows())


def test_columns_name_what_is_not_known(tmp_path: Path) -> None:
    rows = [{"query": "Q", "reply": "A", "hint": "S"}, {"query": "Q2", "reply": "A2", "text": "ignored"}]
    found = list(_open(tmp_path, rows, instruction="query", output="reply", system="hint").rows())
    assert found == [_turns("Q", "A", system="S"), {"instruction": "Q2", "input": "", "output": "A2"}]
    both = [{"messages": OPENAI, "prompt": "P", "completion": "C"}]
    assert next(_open(tmp_path, both, instruction="prompt", output="completion").rows())["output"] == "C"
    assert list(_open(tmp_path, [{"body": "T"}], text="body").rows()) == [{"text": "T"}]
    with pytest.raises(UsageError, match=r"a.jsonl:2: the row has no 'reply', which columns names: it has 'query'"):
        list(_open(tmp_path, [rows[0], {"query": "Q"}], instruction="query", output="reply").rows())


def test_columns_are_for_files_of_rows_and_in_the_fingerprint(tmp_path: Path) -> None:
    columns = ColumnsConfig(text="body")
    (tmp_path / "a.txt").write_text("text")
    for name in ("alpaca", "pydoc", str(tmp_path / "a.txt")):
        with pytest.raises(UsageError, match=r"columns is for (rows of your own|files of rows)"):
            open_source(name, split="train", data_dir=None, columns=columns)
    path = str(tmp_path / "a.jsonl")
    prints = set()
    for names in ({"text": "body"}, {"text": "title"}):
        prints.add(_open(tmp_path, [{"body": "B", "title": "T"}], **names).fingerprint)
    _open(tmp_path, [{"body": "B", "title": "T"}], text="body")
    assert len(prints | {fingerprint_source(path, split="train", data_dir=None)}) == 3


@pytest.mark.parametrize(
    "given", [{"instruction": "a"}, {"text": "a", "messages": "b"}, {"text": "a", "system": "b"}, {}]
)
def test_columns_that_make_no_row_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="columns must be text, or messages"):
        ColumnsConfig(**given)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables(tmp_path: Path, name: str) -> None:
    delimiter = "," if name == "a.csv" else "\t"
    rows = [["question", "answer"], ["Q, with\ncomma", 'an "A"'], ["Q\t2", "A2"]]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    found = list(open_source(str(tmp_path / name), split="train", data_dir=None, want="instructions").rows())
    assert [(row["instruction"], row["output"]) for row in found] == [tuple(row) for row in rows[1:]]
    (tmp_path / name).write_text(f"text{delimiter}b\nx\n")
    with pytest.raises(UsageError, match=rf"{name}:2: more or fewer than the 2 cells"):
        list(open_source(str(tmp_path / name), split="train", data_dir=None).rows())


def test_a_list_may_be_called_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[\n {"text": "one"},\n {"text": "two"}\n]')
    source = open_source(str(tmp_path / "a.jsonl"), split="train", data_dir=None)
    assert [row["text"] for row in source.rows()] == ["one", "two"]


def test_line_ends_of_windows_change_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "info", said.append)
    text = "one\n\ntwo\n three"
    found = {}
    for ends in ("\n", "\r\n", "\r"):
        saved = text.replace("\n", ends)
        (tmp_path / "a.txt").write_bytes(saved.encode())
        files = {"txt": open_source(str(tmp_path / "a.txt"), split="train", data_dir=None)}
        files["jsonl"] = _open(tmp_path, [{"text": saved}], "text.jsonl")
        files["pairs"] = _open(tmp_path, [{"instruction": saved, "output": saved}], "pairs.jsonl")
        files["talk"] = _open(tmp_path, [{"messages": [{**turn, "content": saved} for turn in OPENAI]}], "talk.jsonl")
        found[ends] = {name: list(source.rows()) for name, source in files.items()}
    assert found["\n"] == found["\r\n"] == found["\r"]
    assert found["\r\n"]["txt"] == [{"text": text}]
    assert len(said) == 4  # once a file
    assert said[0].endswith("a.txt: line ends CR LF (or CR) are read as LF.")


def test_conversations_need_the_tokenizers_template(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": OPENAI}) + "\n" + json.dumps({"messages": OPENAI * 2}) + "\n")
    config = TuneDataConfig(dataset=str(path))
    with pytest.raises(UsageError, match=r"a.jsonl, row 2: a conversation of user, assistant, user, .* does not"):
        tuning_samples(config, tiny_tokenizer, seed=0, num_needed=None, model_max_length=4096, data_dir=None)
