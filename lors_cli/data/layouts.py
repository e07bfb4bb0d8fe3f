"""Rows as people have them: which layout their keys make, and the text, question or conversation in a row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from lors_cli.data.prompts import Turn
from lors_cli.errors import UsageError, shorten
from lors_cli.output import console

Kind = Literal["text", "instructions"]
Row = dict[str, Any]
SURROGATE = re.compile("[\ud800-\udfff]")
OPTIONAL = ("input", "context", "system", "history")
"""Keys that may be absent or null."""
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


def read_text_row(row: Row, place: str) -> Row:
    """A row of plain text."""
    return {"text": text_of(row, "text", place)}


def _pair(question: str, answer: str) -> Layout:
    """A question and its answer, with all that may stand beside them."""

    def read(row: Row, place: str) -> Row:
        if isinstance(row.get(question), list) or isinstance(row.get(answer), list):  # TRL's conversational form
            given, learnt = (_turns(row, key, place) for key in (question, answer))
            return {"messages": [*(Turn(turn.role, turn.content) for turn in given), *learnt]}
        extra = next((key for key in ("input", "context") if row.get(key) is not None), "input")
        plain = {
            "instruction": text_of(row, question, place),
            "input": text_of(row, extra, place),
            "output": text_of(row, answer, place),
        }
        before = [*_system(row, place), *_history(row, place)]
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
    _pair("prompt", "completion"), _pair("prompt", "response"), _pair("question", "answer"),
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in (TEXT, *INSTRUCTION_LAYOUTS)}
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
    if TEXT.fits(row):
        return TEXT
    raise UsageError(f"{place}: this row is neither text nor an instruction: {named_keys(row)}.", _mapping(row))


def read_row(row: Row, layout: Layout, place: str) -> Row:
    """What a row of a file says, whose first row has this layout.

    Raises:
        UsageError: it lacks something, or has another layout too.
    """
    others = [other for other in INSTRUCTION_LAYOUTS if other is not layout and other.fits(row)]
    if others and layout.fits(row):
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


def _mapping(row: Iterable[str]) -> str:
    """The mapping to write for rows with these keys."""
    keys = [key for key in row if key not in OPTIONAL]
    if len(keys) == 1:
        ours = {"messages" if keys[0] in ("messages", "conversations") else "text": keys[0]}
    else:
        ours = dict(zip(("instruction", "output"), [*keys, "KEY", "KEY"], strict=False))
    written = ", ".join(f"{name}: {key}" for name, key in ours.items())
    return (
        f"Write columns: {{{written}}} in tune.data or prune.calibration; other names are input, system, history, "
        "messages, text."
    )


# ---- what stands in a row


def text_of(row: Row, key: str, place: str) -> str:
    """One text of a row, checked, its line ends a newline each."""
    found = row.get(key)
    if found is None and key in OPTIONAL:
        return ""
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


def _system(row: Row, place: str) -> list[Turn]:
    prompt = text_of(row, "system", place)
    return [Turn("system", prompt)] if prompt else []


def _history(row: Row, place: str) -> list[Turn]:
    """The questions and answers before that of a row: [[question, answer], …]."""
    turns: list[Turn] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageError(f"{place}: 'history' must be a list of [question, answer], not {shown_value(pair)}.")
        asked, answered = (checked(text, "'history'", place) for text in pair)
        turns += [Turn("user", asked), Turn("assistant", answered, learnt=True)]
    return turns


def _turns(row: Row, key: str, place: str) -> list[Turn]:
    """A list of {"role", "content"} (OpenAI, TRL) or {"from", "value"} (ShareGPT); `weight: 0` is not learnt."""
    items = row.get(key)
    if not isinstance(items, list):
        raise UsageError(f"{place}: {key!r} must be a list of turns, not {shown_value(items)}.")
    turns: list[Turn] = []
    for number, item in enumerate(items, 1):
        what = f"turn {number} of {key!r}"
        names = next((pair for pair in (("role", "content"), ("from", "value"))
                      if isinstance(item, dict) and pair[0] in item), None)  # fmt: skip
        if names is None:
            raise UsageError(f"{place}: {what} must have role and content, or from and value, not {shown_value(item)}.")
        role = _ROLES.get(str(item[names[0]]))
        if role is None or item.get("tool_calls") or item.get("function_call"):
            odd = f"the {names[0]} {item[names[0]]!r}" if role is None else "calls of tools"
            raise UsageError(f"{place}: {what} has {odd}.", f"Known: {', '.join(_ROLES)}; take such rows out.")
        text = checked(item.get(names[1]), f"the {names[1]} of {what}", place)
        turns.append(Turn(role, text, learnt=role == "assistant" and item.get("weight") != 0))
    return turns
