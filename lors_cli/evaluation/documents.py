"""Local documents of the seven zero-shot tasks, checked row by row before lm-eval meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lors_cli.data.layouts import shown_value
from lors_cli.data.text_files import json_values
from lors_cli.errors import SURROGATE, UsageError

Row = dict[str, Any]


def check_documents(task: str, path: Path) -> None:
    """Refuse documents (JSON lines, maybe in a gzip) that lm-eval's definition of one of the seven could not use.

    Raises:
        UsageError: a row is broken, with its line, or there is none.
    """
    number = 0
    for number, row in json_values(path):
        wrong = _CHECKS[task](row) if isinstance(row, dict) else f"not an object but {shown_value(row)}"
        if not wrong and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
            wrong = "it holds half a surrogate pair, which is no character"
        if wrong:
            raise UsageError(f"{path}:{number}: no document of {task}: {wrong}.")
    if not number:
        raise UsageError(f"{path} is empty.")


def _texts(row: Row, *keys: str) -> str:
    """What is wrong with columns that hold text."""
    wrong = [key for key in keys if not isinstance(row.get(key), str)]
    return f"{wrong[0]!r} must be text, not {shown_value(row.get(wrong[0]))}" if wrong else ""


def _one_of(row: Row, key: str, values: list[Any]) -> str:
    """What is wrong with a column that holds one of a few values."""
    if any(row.get(key) == value and type(row.get(key)) is type(value) for value in values):
        return ""
    return f"{key!r} must be one of {', '.join(map(repr, values[:8]))}, not {shown_value(row.get(key))}"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _choices(question: str) -> Callable[[Row], str]:
    def check(row: Row) -> str:
        choices = row.get("choices")
        if not isinstance(choices, dict) or not _is_texts(choices.get("text")) or not _is_texts(choices.get("label")):
            return "'choices' must hold lists of text and label"
        if len(choices["text"]) != len(choices["label"]):
            return "'choices' has not as many texts as labels"
        return _texts(row, question) or _one_of(row, "answerKey", choices["label"])

    return check


def _columns(*texts: str, answer: str, values: list[Any]) -> Callable[[Row], str]:
    return lambda row: _texts(row, *texts) or _one_of(row, answer, values)


def _hellaswag(row: Row) -> str:
    if not _is_texts(row.get("endings")):
        return "'endings' must be a list of texts"
    labels = [str(index) for index in range(len(row["endings"]))]
    return _texts(row, "activity_label", "ctx_a", "ctx_b") or _one_of(row, "label", labels)


def _winogrande(row: Row) -> str:
    wrong = _texts(row, "sentence", "option1", "option2") or _one_of(row, "answer", ["1", "2"])
    return wrong or ("" if "_" in row["sentence"] else "'sentence' has no _ where the options go")


_CHECKS: dict[str, Callable[[Row], str]] = {
    "arc_challenge": _choices("question"), "arc_easy": _choices("question"),
    "boolq": _columns("question", "passage", answer="label", values=[0, 1]),
    "hellaswag": _hellaswag, "openbookqa": _choices("question_stem"),
    "rte": _columns("sentence1", "sentence2", answer="label", values=[0, 1]), "winogrande": _winogrande,
}  # fmt: skip
