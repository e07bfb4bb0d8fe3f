"""What a report is made of, and its form in Markdown; `html`, `latex` and `records` have the other forms.

A report is a list of blocks: tables, figures, code, and texts. A text is a heading (`## Results`) or a paragraph in
Markdown whose only markup is what `escape` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A table's cell in plain text."""

    text: str
    extra: str = ""
    """Said beside it, smaller: a standard error, a difference."""
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A table's row: `group` is a heading within the table (one cell), `detail` belongs to the row above it."""

    cells: tuple[Cell, ...]
    kind: Literal["row", "group", "detail"] = "row"


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""
    prose: bool = False
    """The last column is running text."""


@dataclass(frozen=True)
class Figure:
    """A drawn figure, `figures/<name>.png` beside the report."""

    name: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is."""

    text: str
    language: str = ""


Block = str | Table | Figure | Code


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, prose: bool = False) -> Table:
    """A table of plain texts."""
    return Table(tuple(columns), tuple(Row(tuple(Cell(text) for text in row)) for row in rows), prose=prose)


def to_markdown(blocks: Iterable[Block]) -> str:
    """The blocks as one Markdown text."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Figure):
        return f"![{escape(block.caption)}](figures/{block.name}.png)"
    if isinstance(block, Code):
        longest = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
        fence = "`" * max(3, 1 + longest)
        return f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"
    return block


def markdown_table(found: Table) -> str:
    """A table in Markdown."""
    width = len(found.columns)
    rule = [":--", *["--:"] * (width - 1)]
    if found.prose:
        rule[-1] = ":--"
    lines = [[escape(column) for column in found.columns], rule]
    for row in found.rows:
        if row.kind == "group":
            lines.append([f"**{escape(row.cells[0].text)}**", *[""] * (width - 1)])
            continue
        first = ("↳ " if row.kind == "detail" else "") + _markdown_cell(row.cells[0])
        lines.append([first, *map(_markdown_cell, row.cells[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.is_best:
        text = f"**{text}**"
    return f"{text} {escape(cell.extra)}" if cell.extra else text


def escape(text: Any) -> str:
    """`text` on one line, with what Markdown would take for markup made harmless: of `_` what is not within a word."""
    parts = r"[\\`*\[\]<>|#&~]|(?<!\w)_+|_+(?!\w)"
    return re.sub(parts, lambda found: "".join(f"\\{letter}" for letter in found[0]), " ".join(str(text).split()))


def unescape(text: str) -> str:
    """What `escape` was given, white space aside."""
    return re.sub(r"\\([\\`*\[\]<>|#&~_])", r"\1", text)
