"""What instruction rows are written into: the prompts that the field knows, and a tokenizer's own chat template."""

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
_RESPONSE = "⟦response⟧"
"""Stands for the response while a chat template is rendered."""


@dataclass(frozen=True)
class Template:
    """A prompt for rows with and without an input; it ends where the response begins."""

    with_input: str
    without_input: str
    before_response: str = ""
    """What stands between prompt and response and is learnt with the response."""

    def prompt(self, instruction: str, input: str) -> str:
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


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of Stanford Alpaca, up to and including "### Response:"."""
    return TEMPLATES["alpaca"].prompt(instruction, input)


def chat_prompts(tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """Rows as one turn each of the tokenizer's chat template.

    Args:
        rows: {"instruction", "input"}; an input follows its instruction in a line of its own.

    Returns:
        Of each row what comes before the response, and what ends it (without the white space after that).

    Raises:
        UsageError: there is no chat template, or it has no place for a question and its answer.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "data.template: chat needs the tokenizer's chat template, and this one has none.",
            f"Choose one of {', '.join(TEMPLATES)}, or a model that was tuned for chat.",
        )
    talks = [
        [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))},
         {"role": "assistant", "content": _RESPONSE}]
        for row in rows
    ]  # fmt: skip
    texts = _rendered(tokenizer, talks)
    if not all(_RESPONSE in text for text in texts):
        raise UsageError("The tokenizer's chat template leaves the answer out.", "Choose another data.template.")
    parts = [text.rpartition(_RESPONSE) for text in texts]
    return [(before, after.rstrip()) for before, _, after in parts]


def _rendered(tokenizer: Any, talks: list[list[dict[str, str]]]) -> list[str]:
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _DATE_MACRO + template
        return tokenizer.apply_chat_template(talks, chat_template=template, tokenize=False)
    except Exception as error:  # a template is code of the model's, and fails in every way that code does
        raise UsageError(
            f"The tokenizer's chat template refuses a question and its answer: {innermost(error)}",
            "Choose another data.template, or mend chat_template in tokenizer_config.json.",
        ) from error
