"""Tables in LaTeX, for booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lors_cli.output.markdown import Cell, Row, Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "{''}", "`": r"\textasciigrave{}", "[": "{[}", "*": "{*}",
    "±": r"$\pm$", "Δ": r"$\Delta$", "−": "$-$", "–": r"\textendash{}", "—": r"\textemdash{}",
    "→": r"$\to$", "×": r"$\times$",
}  # fmt: skip
_HEAD = r"% Needs \usepackage{booktabs} and, before TeX Live 2020, \usepackage{textcomp}."


def to_latex(tables: Iterable[Table]) -> str:
    """Each table as a `table*` environment with its caption."""
    return "\n\n".join([_HEAD, *map(_latex_table, tables)]) + "\n"


def _latex_table(table: Table) -> str:
    width = len(table.columns)
    lines = [
        r"\begin{table*}[t]", r"\centering", r"\scriptsize", r"\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape(table.caption)}}}", rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule",
        " & ".join(map(escape, table.columns)) + r" \\", r"\midrule",
    ]  # fmt: skip
    for index, row in enumerate(table.rows):
        if row.kind == "group" and index:
            lines.append(r"\addlinespace")
        lines.append(_latex_row(row, width))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"])


def _latex_row(row: Row, width: int) -> str:
    if row.kind == "group":
        return rf"\multicolumn{{{width}}}{{l}}{{\textbf{{{escape(row.cells[0].text)}}}}} \\"
    first = (r"\quad " if row.kind == "detail" else "") + escape(row.cells[0].text)
    return " & ".join([first, *map(_number, row.cells[1:])]) + r" \\"


def _number(cell: Cell) -> str:
    text = _with_minus(escape(cell.text))
    if cell.is_best:
        text = rf"\textbf{{{text}}}"
    return rf"{text} {{\tiny {_with_minus(escape(cell.extra))}}}" if cell.extra else text


def _with_minus(text: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text)


def escape(text: str) -> str:
    """`text` on one line, with what TeX would take for a command, an option or a dash made harmless."""
    return "".join(_SPECIAL.get(letter, letter) for letter in " ".join(text.split())).replace("--", "-{}-")
