"""What instruction rows are written into: the prompts that the field knows, and a tokenizer's own chat template.

A row becomes one text, of which some spans are learnt; it is tokenised whole, so the model sees the tokens that the
template itself gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lors_cli.errors import UsageError, innermost

CHAT_DATE = datetime(2024, 7, 26)
"""What a chat template that writes today's date is told, so that samples do not change with the day."""
_DATE_MACRO = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('{code}', '{CHAT_DATE.strftime(code)}')" for code in map("%{}".format, "YymBbdAaHIMSp"))
    + " }}{%- endmacro -%}"
)
"""Takes the place of transformers' own `strftime_now` in a template."""
_MARKER = "\ue000{}\ue001"
"""Stands for a text while a chat template is rendered to find its place."""


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation says."""

    role: str
    """system, user or assistant."""
    content: str
    learnt: bool = False
    """Whether its tokens get labels; of an assistant's turns alone."""


@dataclass(frozen=True)
class Rendered:
    """A row as one text."""

    text: str
    spans: list[tuple[int, int, int]]
    """Of each answer that is learnt, in order: its first character, its end, and the end of what ends it."""
    begin: list[int]
    """Tokens before the text."""
    end: list[int]
    """Tokens after it, learnt too."""


def turns_of(row: dict[str, Any]) -> list[Turn]:
    """A row of a source of instructions as a conversation; an input follows its instruction in a line of its own."""
    if "messages" in row:
        return row["messages"]
    question = "\n".join(filter(None, (row["instruction"], row["input"])))
    return [Turn("user", question), Turn("assistant", row["output"], learnt=True)]


@dataclass(frozen=True)
class Template:
    """A prompt for rows with and without an input; it ends where the response begins."""

    with_input: str
    without_input: str
    before_response: str = ""
    """What stands between prompt and response and is learnt with the response."""

    def prompt(self, instruction: str, input: str = "") -> str:
        """The prompt of a row, whose input may be empty."""
        template = self.with_input if input else self.without_input
        # One pass over the template: braces in a row's own text stay as they are.
        return template.format(instruction=instruction, input=input)


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES = {
    # tatsu-lab/stanford_alpaca, train.py (no newline after "### Response:")
    "alpaca": Template(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:",
    ),
    # tloen/alpaca-lora, templates/alpaca_short.json
    "alpaca_short": Template(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    # lm-sys/FastChat, conversation.py, vicuna_v1.1; an input follows its instruction in a line of its own
    "vicuna": Template(
        _VICUNA + "USER: {instruction}\n{input} ASSISTANT:", _VICUNA + "USER: {instruction} ASSISTANT:", " "
    ),
}


def template_text(name: str, row: dict[str, Any]) -> tuple[str, int]:
    """A row written into one of `TEMPLATES`, without begin and end, and where its prompt ends.

    Raises:
        UsageError: the row is more than a question and its answer.
    """
    if "messages" in row:
        turns = row["messages"]
        if [turn.role for turn in turns] != ["user", "assistant"]:
            roles = ", ".join(turn.role for turn in turns)
            raise UsageError(
                f"a conversation of {roles} does not fit the prompt {name}, which is one question and its answer.",
                "Set tune.data.template: chat, the tokenizer's own chat template.",
            )
        row = {"instruction": turns[0].content, "input": "", "output": turns[1].content}
    prompt = TEMPLATES[name].prompt(row["instruction"], row["input"])
    return prompt + TEMPLATES[name].before_response + row["output"], len(prompt)


def whole_text(row: dict[str, Any]) -> str:
    """A row as text for calibration: Alpaca's prompt and the response, longer conversations turn by turn."""
    turns = turns_of(row)
    if [turn.role for turn in turns] == ["user", "assistant"]:
        return template_text("alpaca", row)[0]
    return "\n\n".join(turn.content for turn in turns)


class ChatTemplate:
    """A tokenizer's own chat template, and what it makes of conversations.

    Args:
        eos: the token to end a conversation whose template ends it with none.

    Raises:
        UsageError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, eos: int) -> None:
        if not tokenizer.chat_template:
            raise UsageError(
                "data.template: chat needs the tokenizer's chat template, and this one has none.",
                f"Choose one of {', '.join(TEMPLATES)}, or a model that was tuned for chat.",
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them the default
            raise UsageError(
                f"The tokenizer's chat template cannot be chosen: {innermost(error)}",
                "Choose another data.template, or mend chat_template in tokenizer_config.json.",
            ) from error
        if not isinstance(template, str):
            raise UsageError(
                f"The tokenizer's chat template is no text but a {type(template).__name__}.",
                "Choose another data.template, or mend chat_template in tokenizer_config.json.",
            )
        self._template = _DATE_MACRO + template if "strftime_now" in template else template
        self._tokenizer, self._eos = tokenizer, eos
        self._tried: set[tuple[str, ...]] = set()
        """Sequences of roles of which it is known that every text of theirs is written."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """A conversation as the template writes it, to the end of its last answer.

        What changes in the whole text when an answer is another one is that answer's place in it; it is learnt with
        what ends the last answer, wherever that stands after it. An empty answer is not learnt.

        Raises:
            UsageError: the template refuses the conversation, or leaves a text of it out.
        """
        self._try_roles(turns)
        whole = self._whole(turns)
        for turn in turns:
            if turn.role != "assistant" and turn.content.strip() not in whole:
                raise _left_out(turn.role)
        learnt = [number for number, turn in enumerate(turns) if turn.learnt and turn.content.strip()]
        places = {number: self._place(turns, number, whole) for number in learnt}
        last = len(turns) - 1
        stop = places[last][1] if last in places else self._place(turns, last, whole)[1]
        ending = whole[stop:].rstrip()
        spans = [(first, end, end + _length_of_end(whole, first, end, ending)) for first, end in places.values()]
        return Rendered(whole[: stop + len(ending)], spans, [], [] if ending or last not in places else [self._eos])

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A conversation up to where its next answer begins.

        Raises:
            UsageError: the template refuses the conversation, or leaves a text of it out.
        """
        self._try_roles(turns)
        return self._whole(turns, asks=True)

    def _place(self, turns: Sequence[Turn], number: int, whole: str) -> tuple[int, int]:
        """Where in the whole text the answer `number` is."""
        marker = _MARKER.format("answer")
        before, found, after = self._whole(_with_contents(turns, {number: marker})).partition(marker)
        first = _shared(before, whole)
        stop = len(whole) - _shared(after[::-1], whole[first:][::-1])
        if not found or (stop == first and turns[number].content.strip()):
            raise _left_out("assistant")
        return first, stop

    def _try_roles(self, turns: Sequence[Turn]) -> None:
        """Refuse roles of which the template leaves a text out; a text that is there by chance hides nothing."""
        roles = tuple(turn.role for turn in turns)
        if roles in self._tried:
            return
        markers = {number: _MARKER.format(number) for number in range(len(turns))}
        text = self._whole(_with_contents(turns, markers))
        for number, marker in markers.items():
            if marker not in text and roles[number] != "assistant":
                raise _left_out(roles[number])
        self._tried.add(roles)

    def _whole(self, turns: Sequence[Turn], asks: bool = False) -> str:
        talk = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._tokenizer.apply_chat_template(
                talk, chat_template=self._template, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # a template is code of the model's, and fails in every way that code does
            raise UsageError(
                f"the tokenizer's chat template refuses a conversation of {', '.join(turn.role for turn in turns)}: "
                f"{innermost(error)}",
                "Choose another data.template, change the row, or mend chat_template in tokenizer_config.json.",
            ) from error


def _with_contents(turns: Sequence[Turn], contents: dict[int, str]) -> list[Turn]:
    return [Turn(turn.role, contents.get(number, turn.content)) for number, turn in enumerate(turns)]


def _left_out(role: str) -> UsageError:
    what = {"user": "instruction", "assistant": "answer", "system": "system prompt"}[role]
    return UsageError(f"the tokenizer's chat template leaves the {what} out.", "Choose another data.template.")


def _length_of_end(whole: str, first: int, stop: int, ending: str) -> int:
    """Characters after an answer that end it, as `ending` ends the last one; none where it brings its own end."""
    if ending and whole[first:stop].endswith(ending):
        return 0
    return _shared(ending, whole[stop:])


def _shared(some: str, other: str) -> int:
    """Characters that two texts have in common from their start."""
    if other.startswith(some):
        return len(some)
    return next((number for number, (a, b) in enumerate(zip(some, other, strict=False)) if a != b), len(other))
