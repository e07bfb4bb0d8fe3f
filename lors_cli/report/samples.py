"""What each model went on to say from the same prompts: a run's short texts as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lors_cli.evaluation.texts import NEW_TOKENS, read_texts, texts_path
from lors_cli.output.markdown import Block, Cell, Row, Table, escape
from lors_cli.report.results import Scores


def samples(root: Path, scores: Mapping[str, Scores]) -> list[Block]:
    """The texts of the models that are evaluated, prompt by prompt; nothing where there are none.

    Args:
        root: the folder that the scores' folders are relative to.
    """
    read = {label: read_texts(texts_path(root / found.folder, label))
            for label, found in scores.items() if found.content is not None}  # fmt: skip
    found = {label: content for label, content in read.items() if content and content["texts"]}
    said: dict[str, list[Row]] = {}
    for label, content in found.items():
        for each in content["texts"]:
            rows = said.setdefault(each["prompt"], [Row((Cell(_printable(each["prompt"])),), "group")])
            rows.append(Row((Cell(label), Cell(_printable(each["text"])))))
    if not said:
        return []
    table = Table(("model", "text"), tuple(row for rows in said.values() for row in rows), prose=True)
    formats = ", ".join(f"{label} {content.get('format')}" for label, content in found.items())
    note = f"The likeliest {NEW_TOKENS} tokens at most, from the same prompts. Prompt format: {formats}."
    return [table, escape(note)]


def _printable(text: str) -> str:
    """A text on one line, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "�" for char in " ".join(text.split())) or "(nothing)"
