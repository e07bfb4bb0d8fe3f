"""What a model is asked to answer or to continue: rows without an answer, in the prompt that the model knows.

A row is as in `prompts`: {"instruction", "input", "output"} or {"messages": turns}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.data import text_files
from lors_cli.data.layouts import INSTRUCTION_LAYOUTS, Layout, named_keys
from lors_cli.data.prompts import TEMPLATES, ChatTemplate, Turn, template_text, turns_of
from lors_cli.data.saved_prompts import template_name
from lors_cli.data.tokenising import begin_tokens, encode, eos_token_id
from lors_cli.errors import MissingError, UsageError, did_you_mean
from lors_cli.files.records import read_record

Row = dict[str, Any]
PLAIN, CHAT = "plain", "chat"
FORMATS = (*TEMPLATES, CHAT)
"""What `--template` may be."""


def question(text: str, input: str = "") -> Row:
    """A text as a row."""
    return {"instruction": text, "input": input, "output": ""}


def shown(row: Row) -> str:
    """What is asked, as the user wrote it."""
    return "\n\n".join(turn.content for turn in _asked(row))


def _asked(row: Row) -> list[Turn]:
    """The turns of a row up to the one that is to be answered."""
    turns = list(turns_of(row))
    while turns and turns[-1].role == "assistant":
        turns.pop()
    return turns


# ---- files of prompts


def read_prompts(path: Path) -> list[Row]:
    """The prompts of a file: a .txt has one a line, a file of rows (.jsonl, .csv, …) one a row.

    Raises:
        UsageError: it has none, or a row asks nothing or several things, with file and row.
    """
    if not path.is_file():
        raise MissingError(f"There is no file {path}.", "Give a .txt with a prompt a line, or a .jsonl with one a row.")
    form = text_files.file_format(path)
    if form == "safetensors":
        raise UsageError(f"{path} holds tokens and is no file of prompts.", "Give a .txt or a .jsonl.")
    if form == "txt":
        found = [question(line.strip()) for line in text_files.read_text(path).split("\n") if line.strip()]
    else:
        found = [_read(row, f"{path}:{number}") for number, row in text_files.json_values(path)]
    if not found:
        raise UsageError(f"{path} holds no prompt.")
    return found


def _read(row: Any, place: str) -> Row:
    """One row, whose answer, if it has one, is left out."""
    if not isinstance(row, dict):
        raise UsageError(f"{place}: a row must be an object with keys, such as prompt.")
    firsts: dict[str, Layout] = {}
    for layout in INSTRUCTION_LAYOUTS:
        firsts.setdefault(layout.keys[0], layout)
    there = [key for key in (*firsts, "text") if row.get(key) is not None]
    if len(there) != 1:
        known = ", ".join((*firsts, "text"))
        what = f"{' and '.join(there)} are prompts both" if there else f"a row must have one of {known}"
        raise UsageError(f"{place}: {what}; {named_keys(row)}.")
    if there == ["text"]:
        row, there = {"instruction": row["text"]}, ["instruction"]
    layout, asked = firsts[there[0]], row[there[0]]
    if len(layout.keys) == 2:
        filled = {**row, layout.keys[1]: [] if isinstance(asked, list) else ""}
    else:  # a conversation, which the layout reads up to its last answer
        filled = {**row, there[0]: [*asked, _answer_like(asked)]} if isinstance(asked, list) else row
    read = layout.read(filled, place)
    if not _asked(read) or not shown(read).strip():
        raise UsageError(f"{place}: there is nothing to answer.")
    return read


def _answer_like(turns: list[Any]) -> dict[str, str]:
    """An empty answer in the form of these turns."""
    sharegpt = bool(turns) and isinstance(turns[-1], dict) and "from" in turns[-1]
    return {"from": "gpt", "value": ""} if sharegpt else {"role": "assistant", "content": ""}


# ---- the prompt that a model knows


@dataclass(frozen=True)
class PromptFormat:
    """How a row is written for a model."""

    name: str
    """One of `FORMATS`, or plain: the text alone."""
    why: str
    """In a few words."""


def prompt_format(folder: Path | None, tokenizer: Any, wanted: str | None = None) -> PromptFormat:
    """The prompt of a model: `wanted`, else what lors tuned it with, else its chat template, else the plain text.

    Args:
        folder: the model's, None where it has none here.
        wanted: one of `FORMATS`, or plain.

    Raises:
        UsageError: no such prompt, or the tokenizer has no chat template.
    """
    if wanted is not None:
        if wanted not in (*FORMATS, PLAIN):
            hint = did_you_mean(wanted.lower(), FORMATS)
            raise UsageError(f"the prompt {wanted} is none of {', '.join(FORMATS)}.", hint)
        if wanted == CHAT and not tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template.", f"Choose one of {', '.join(TEMPLATES)}.")
        return PromptFormat(wanted, "as asked for")
    trained = _trained_with(folder) if folder is not None else None
    if trained in TEMPLATES or (trained == CHAT and tokenizer.chat_template):
        return PromptFormat(str(trained), "which it was tuned with")
    if tokenizer.chat_template:
        made_of = template_name(tokenizer.chat_template)
        return PromptFormat(made_of, "its chat template") if made_of else PromptFormat(CHAT, "its own template")
    return PromptFormat(PLAIN, "it has no chat template")


def _trained_with(folder: Path) -> str | None:
    """The prompt of the instructions that a folder's model was tuned on by lors; None where there were none."""
    record = read_record(folder)
    if record is None or record.stage != "tune":
        return None
    said = record.metrics.get("prompt")
    return said.get("format") if isinstance(said, dict) else None


def prompt_tokens(form: PromptFormat, row: Row, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, those that training on it begins with.

    Raises:
        UsageError: the row does not fit the prompt, or there is no token.
    """
    if form.name == CHAT:
        text, begin = ChatTemplate(tokenizer, eos_token_id(tokenizer)).prompt(_asked(row)), []
    elif form.name == PLAIN:
        text, begin = shown(row), begin_tokens(tokenizer)
    else:
        whole = {**row, "messages": [*_asked(row), Turn("assistant", "")]} if "messages" in row else row
        text, boundary = template_text(form.name, whole)
        text, begin = text[:boundary], begin_tokens(tokenizer)
    tokens = [*begin, *encode(tokenizer, [text])[0]]
    if not tokens:
        raise UsageError("the prompt is empty, and this tokenizer puts no token before a text.", "Give some text.")
    return tokens


def end_tokens(form: PromptFormat, tokenizer: Any, known: int | Sequence[int] | None) -> list[int]:
    """The tokens that end an answer: end-of-sequence, the generation settings' (`known`), the end of a chat's turn."""
    ends = [eos_token_id(tokenizer), *([known] if isinstance(known, int) else known or ())]
    if form.name == CHAT:
        try:
            talk = ChatTemplate(tokenizer, ends[0]).render(
                [Turn("user", "How?"), Turn("assistant", "So.", learnt=True)]
            )
        except UsageError:  # a template that wants another conversation; the generation settings have its end
            return list(dict.fromkeys(ends))
        ending = talk.text[talk.spans[0][0] :].removeprefix("So.").strip()
        tokens = encode(tokenizer, [ending])[0] if ending else []
        ends += tokens if len(tokens) == 1 else []
    return list(dict.fromkeys(ends))
