"""A report as one HTML file that needs nothing else: its style and its figures are in it, and there is no script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from lors_cli.output.markdown import Block, Cell, Code, Figure, Row, Table, unescape
from lors_cli.report.drawing import Drawing

_STYLE = Path(__file__).with_name("style.css")


def to_html(blocks: Iterable[Block], drawings: Mapping[str, Drawing]) -> str:
    """The whole page; the first block is the report's title."""
    blocks = list(blocks)
    title = unescape(str(blocks[0]).lstrip("# "))
    body = "\n".join(_block(block, drawings) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block, drawings: Mapping[str, Drawing]) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        picture = drawings[block.name].svg
        return f"<figure>\n{picture}<figcaption>{escape(block.caption)}</figcaption>\n</figure>"
    if isinstance(block, Code):
        return f"<pre><code>{escape(block.text.rstrip())}</code></pre>"
    heading = re.match(r"(#{1,6}) ", block)
    if heading:
        level = len(heading[1])
        return f"<h{level}>{escape(unescape(block[heading.end() :]))}</h{level}>"
    return f"<p>{escape(unescape(block))}</p>"


def _table(table: Table) -> str:
    last = len(table.columns) - 1
    kinds = [' class="text"' if table.prose and index == last else "" for index in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "\n".join(_row(row, kinds) for row in table.rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _row(row: Row, kinds: list[str]) -> str:
    first = _cell(row.cells[0])
    if row.kind == "group":
        return f'<tr class="group"><th scope="rowgroup" colspan="{len(kinds)}"><span>{first}</span></th></tr>'
    rest = "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row.cells[1:], kinds[1:], strict=True))
    mark = ' class="detail"' if row.kind == "detail" else ""
    return f'<tr{mark}><th scope="row"><div>{first}</div></th>{rest}</tr>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.is_best:
        text = f"<b>{text}</b>"
    return f"{text} <small>{escape(cell.extra)}</small>" if cell.extra else text
