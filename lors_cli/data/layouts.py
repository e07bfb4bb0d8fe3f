"""Rows as people have them: which layout their keys make, and the text, question or conversation in a row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from lors_cli.data.prompts import Turn
from lors_cli.errors import SURROGATE, UsageError, shorten
from lors_cli.output import console

Kind = Literal["text", "instructions"]
Row = dict[str, Any]
OPTIONAL = ("input", "context", "system", "system_prompt", "history")
"""Keys that may be absent or null."""
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
"""Keys of a question and its answer that are one entry of a conversation."""
_QUESTIONS = ("instruction", "question", "prompt", "query", "user", "human", "problem", "input")
_ANSWERS = ("output", "response", "answer", "completion", "reply", "assistant", "solution", "target", "chosen")
"""Words in the names of columns, for the mapping that a message shows."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Layout:
    """A kind of row, by the keys that it must have."""

    name: str
    kind: Kind
    keys: tuple[str, ...]
    read: Callable[[Row, str], Row]
    """From a row and its place (file:row) to {"text"}, {"instruction", "input", "output"} or {"messages": turns}."""

    def fits(self, row: Row) -> bool:
        """Whether a row has all keys, null counting as absent."""
        return all(row.get(key) is not None for key in self.keys)

    def lacks_answer(self, row: Row) -> bool:
        """Whether a row has all keys, and of a question and its answer the latter is null."""
        return len(self.keys) == 2 and row.get(self.keys[0]) is not None and row.get(self.keys[1], "") is None


def read_text_row(row: Row, place: str) -> Row:
    """A row of plain text."""
    return {"text": text_of(row, "text", place)}


def _pair(question: str, answer: str) -> Layout:
    """A question and its answer, with a system prompt; beside an instruction also an input, and a history.

    An answer that is null is empty.
    """
    is_instruction = question == "instruction"

    def read(row: Row, place: str) -> Row:
        if row.get(answer, "") is None:
            row = {**row, answer: [] if isinstance(row.get(question), list) else ""}
        if isinstance(row.get(question), list) or isinstance(row.get(answer), list):  # TRL's conversational form
            given, learnt = (_turns(row, key, place) for key in (question, answer))
            before = [*_system(row, place), *(Turn(turn.role, turn.content) for turn in given)]
            return {"messages": [*before, *learnt]}
        plain = {
            "instruction": text_of(row, question, place),
            "input": _one_of(row, "input", "context", place) if is_instruction else "",
            "output": text_of(row, answer, place),
        }
        before = [*_system(row, place), *(_history(row, place) if is_instruction else ())]
        if not before:
            return plain
        asked = "\n".join(filter(None, (plain["instruction"], plain["input"])))
        return {"messages": [*before, Turn("user", asked), Turn("assistant", plain["output"], learnt=True)]}

    return Layout(f"{question}/{answer}", "instructions", (question, answer), read)


def _talk(key: str) -> Layout:
    def read(row: Row, place: str) -> Row:
        turns = [*_system(row, place), *_turns(row, key, place)]
        while turns and turns[-1].role != "assistant":  # nothing answers them
            turns.pop()
        return {"messages": turns}

    return Layout(key, "instructions", (key,), read)


TEXT = Layout("text", "text", ("text",), read_text_row)
INSTRUCTION_LAYOUTS = (
    _talk("messages"), _talk("conversations"), _pair("instruction", "output"), _pair("instruction", "response"),
    _pair("prompt", "completion"), _pair("prompt", "response"), _pair("question", "answer"), _talk("conversation"),
    _pair("question", "response"), _pair("query", "response"), _pair("inputs", "targets"),
)  # fmt: skip
_NOT_READ = (
    (("chosen", "rejected"), "a pair of preferences, and tuning learns answers, not preferences"),
    (("text", "role", "parent_id"), "one message of a tree, as OpenAssistant has them, and no whole conversation"),
    (("text", "label"), "text with a label, and nothing here learns labels"),
    (("text", "labels"), "text with labels, and nothing here learns labels"),
)
"""Keys of rows that would be read as less than they are, and what such rows are."""
LAYOUTS = {layout.name: layout for layout in (TEXT, *INSTRUCTION_LAYOUTS)}
_OTHERS = "If that column is no part of the question, name those that are with columns (docs/data.md)."
KEYS = frozenset([*TEXT.keys, *OPTIONAL, *(key for layout in INSTRUCTION_LAYOUTS for key in layout.keys)])
"""All keys that any layout reads."""


def layout_of(row: Row, place: str) -> Layout:
    """The layout of a row; one with a text beside an instruction (the hub's table of Alpaca) is an instruction.

    Raises:
        UsageError: none fits, or several do.
    """
    found = [layout for layout in INSTRUCTION_LAYOUTS if layout.fits(row)]
    if len(found) > 1:
        raise UsageError(
            f"{place}: this row is both {' and '.join(layout.name for layout in found)}.",
            f"Say which is meant. {_mapping(dict.fromkeys(found[0].keys))}",
        )
    if found:
        return found[0]
    for keys, what in _NOT_READ:
        if all(key in row for key in keys):
            raise UsageError(f"{place}: this row is {what}: {named_keys(row)}.", _mapping(row))
    if TEXT.fits(row):
        return TEXT
    unanswered = [layout for layout in INSTRUCTION_LAYOUTS if layout.lacks_answer(row)]
    if len(unanswered) == 1:
        return unanswered[0]
    null = [key for layout in LAYOUTS.values() if all(key in row for key in layout.keys) for key in layout.keys
            if row[key] is None]  # fmt: skip
    if null:
        raise UsageError(
            f"{place}: {null[0]!r} is null, and the first row says what rows these are.", "Put a whole row first."
        )
    raise UsageError(f"{place}: this row is neither text nor an instruction: {named_keys(row)}.", _mapping(row))


def read_row(row: Row, layout: Layout, place: str) -> Row:
    """What a row of a file says, whose first row has this layout.

    Raises:
        UsageError: it lacks something, or has another layout too.
    """
    others = [other for other in INSTRUCTION_LAYOUTS if other is not layout and other.fits(row)]
    if others and all(key in row for key in layout.keys):
        raise UsageError(
            f"{place}: this row is {others[0].name}, while rows before it were read as {layout.name}.",
            f"Say which is meant. {_mapping(dict.fromkeys(layout.keys))}",
        )
    return layout.read(row, place)


def mapped(row: Row, columns: Mapping[str, str] | None, place: str) -> Row:
    """A row with our names for its columns, others left out; the row itself without a mapping.

    Raises:
        UsageError: it lacks one that must be there.
    """
    if columns is None:
        return row
    missing = [theirs for ours, theirs in columns.items() if theirs not in row and ours not in OPTIONAL]
    if missing:
        raise UsageError(f"{place}: the row has no {missing[0]!r}, which columns names: {named_keys(row)}.")
    return {ours: row.get(theirs) for ours, theirs in columns.items()}


def named_keys(row: Row) -> str:
    """The keys of a row, for a message."""
    return f"it has {', '.join(map(repr, row))}" if row else "it is empty"


def _mapping(row: Row) -> str:
    """The mapping to write for such a row, guessed by its values and the names of its columns."""
    talk = next((key for key, value in row.items() if isinstance(value, list) and len(value) > 1), None)
    keys = [key for key in row if key not in OPTIONAL] or [*row]
    question = _named(_QUESTIONS, [*row])
    answer = _named(_ANSWERS, [key for key in row if key != question])
    if talk is not None:
        ours = {"messages": talk}
    elif question is not None and answer is not None:
        ours = {"instruction": question, "output": answer}
    elif len(keys) == 1 or "text" in row:
        talks = ("messages", "conversations", "conversation")
        ours = {"text": "text"} if "text" in row else {"messages" if keys[0] in talks else "text": keys[0]}
    else:
        ours = dict(zip(("instruction", "output"), [*keys, "KEY", "KEY"], strict=False))
    written = ", ".join(f"{name}: {key}" for name, key in ours.items())
    return (
        f"Write columns: {{{written}}} in tune.data or prune.calibration; other names are input, system, history, "
        "messages, text."
    )


def _named(words: Iterable[str], keys: list[str]) -> str | None:
    """The key that has the first of these words in its name."""
    return next((key for word in words for key in keys if word in key.lower()), None)


# ---- what stands in a row


def text_of(row: Row, key: str, place: str) -> str:
    """One text of a row, checked, its line ends a newline each."""
    found = row.get(key)
    if key in OPTIONAL:
        if found is None:
            return ""
        if not isinstance(found, str):
            raise UsageError(f"{place}: {key!r} must be text, not {shown_value(found)}.", _OTHERS)
    if key not in row:
        raise UsageError(f"{place}: the row has no {key!r}; {named_keys(row)}.", _mapping(row))
    return checked(found, repr(key), place)


def checked(found: Any, what: str, place: str) -> str:
    """A text, or a UsageError; line ends as Windows and old Macs save them become newlines."""
    if not isinstance(found, str):
        raise UsageError(f"{place}: {what} must be text, not {shown_value(found)}.")
    if SURROGATE.search(found):
        raise UsageError(f"{place}: {what} holds half a surrogate pair, which is no character.")
    return with_newlines(found, place)


def with_newlines(text: str, place: str) -> str:
    """The text with CR LF and CR turned into LF, as editors show them; the log says so once a file."""
    if "\r" not in text:
        return text
    _say_line_ends(re.sub(r":\d+$", "", place))
    return text.replace("\r\n", "\n").replace("\r", "\n")


@cache
def _say_line_ends(file: str) -> None:
    console.info(f"  {file}: line ends CR LF (or CR) are read as LF.")


def shown_value(value: Any) -> str:
    """A JSON value for a message."""
    return shorten(json.dumps(value, ensure_ascii=False, default=str), 41)


def _one_of(row: Row, first: str, second: str, place: str) -> str:
    """An optional text by either name; beside an empty first one, a second one that is no text is another thing."""
    text = text_of(row, first, place)
    is_other = row.get(first) is not None and not isinstance(row.get(second), str)
    return text if text or is_other else text_of(row, second, place)


def _system(row: Row, place: str) -> list[Turn]:
    prompt = _one_of(row, "system", "system_prompt", place)
    return [Turn("system", prompt)] if prompt else []


def _history(row: Row, place: str) -> list[Turn]:
    """The questions and answers before that of a row: [[question, answer], …]."""
    turns: list[Turn] = []
    pairs = row.get("history") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            what = f"'history' must be a list of [question, answer], not {shown_value(pair)}."
            raise UsageError(f"{place}: {what}", _OTHERS)
        asked, answered = (checked(text, "'history'", place) for text in pair)
        turns += [Turn("user", asked), Turn("assistant", answered, learnt=True)]
    return turns


def _turns(row: Row, key: str, place: str) -> list[Turn]:
    """A list of {"role", "content"} (OpenAI, TRL), {"from", "value"} (ShareGPT) or of questions with their answers
    (`_PAIRS`); `weight: 0` is not learnt, and an answer that is null is empty."""
    items = row.get(key)
    table: Row = items if isinstance(items, dict) else {}  # as `datasets` may do
    columns = list(table.values())
    if all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        items = [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(items, list):
        raise UsageError(f"{place}: {key!r} must be a list of turns, not {shown_value(items)}.")
    turns: list[Turn] = []
    for number, item in enumerate(items, 1):
        what = f"turn {number} of {key!r}"
        pair = next((pair for pair in _PAIRS if isinstance(item, dict) and all(name in item for name in pair)), None)
        if pair is not None:
            said = (item[pair[0]], "" if item[pair[1]] is None else item[pair[1]])
            asked, answered = (checked(text, f"the {name} of {what}", place)
                               for name, text in zip(pair, said, strict=True))  # fmt: skip
            turns += [Turn("user", asked), Turn("assistant", answered, learnt=True)]
            continue
        names = next((names for names in (("role", "content"), ("from", "value"))
                      if isinstance(item, dict) and names[0] in item), None)  # fmt: skip
        if names is None:
            raise UsageError(f"{place}: {what} must have role and content, or from and value, not {shown_value(item)}.")
        role = _ROLES.get(str(item[names[0]]))
        if role is None or item.get("tool_calls") or item.get("function_call"):
            odd = f"the {names[0]} {item[names[0]]!r}" if role is None else "calls of tools"
            raise UsageError(f"{place}: {what} has {odd}.", f"Known: {', '.join(_ROLES)}; take such rows out.")
        found = "" if role == "assistant" and item.get(names[1], "…") is None else item.get(names[1])
        text = checked(found, f"the {names[1]} of {what}", place)
        turns.append(Turn(role, text, learnt=role == "assistant" and item.get("weight") != 0))
    return turns
