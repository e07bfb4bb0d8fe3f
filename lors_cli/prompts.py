"""The prompt that instruction rows are tuned with."""

from __future__ import annotations

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of Stanford Alpaca, which ends where the response begins.

    Args:
        instruction: the task.
        input: what the task is about; when empty the shorter template is taken.

    Returns:
        The text up to and including "### Response:".

    Source: tatsu-lab/stanford_alpaca, train.py (no newline after "### Response:").
    """
    template = _WITH_INPUT if input else _WITHOUT_INPUT
    # One pass over the template: braces in a row's own text stay as they are.
    return template.format(instruction=instruction, input=input)
