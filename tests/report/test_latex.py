"""Tables as LaTeX: nothing of what is named in them may be a command."""

from __future__ import annotations

import re

from lors_cli.output.markdown import Cell, Row, Table
from lors_cli.report.latex import escape, to_latex

HOSTILE = r"\input{/etc/passwd} $x_1^2$ 50% a&b #1 ~ {z} <script> | [2pt] * -- `q`"


def unescaped(text: str) -> list[str]:
    """TeX's special letters that would still act, once the escapes and the commands we write are taken out."""
    ours = (r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textasciigrave|textendash)"
            r"\{\}|\\[{}$&#%_]|\{\[\}|\{\*\}|-\{\}-")  # fmt: skip
    return re.findall(r"[\\$&#%_^~{}]", re.sub(ours, "", text))


def test_escape() -> None:
    assert unescaped(escape(HOSTILE)) == []
    assert escape("a_b\n50%") == r"a\_b 50\%"
    assert "[2pt]" not in escape(HOSTILE)
    assert "--" not in escape(HOSTILE)


def test_a_table() -> None:
    rows = (
        Row((Cell("2:4 & more"),), "group"),
        Row((Cell("a_b"), Cell("41.00", "± 1.20", is_best=True), Cell("60.0%"))),
        Row((Cell("paper"), Cell("40.00", "(-1.00)"), Cell("-3"))),
        Row((Cell("[1pt]"), Cell("–"), Cell("")), "detail"),
    )
    lines = to_latex([Table(("model", "x_y", "z"), rows, caption=HOSTILE)]).splitlines()
    assert r"\begin{tabular}{lrr}" in lines
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert body == [
        r"\multicolumn{3}{l}{\textbf{2:4 \& more}} \\",
        r"a\_b & \textbf{41.00} {\tiny $\pm$ 1.20} & 60.0\% \\",
        r"paper & 40.00 {\tiny ($-$1.00)} & $-$3 \\",
        r"\quad {[}1pt] & \textendash{} &  \\",
    ]
    caption = next(line for line in lines if line.startswith(r"\caption{"))
    assert unescaped(caption.removeprefix(r"\caption{").removesuffix("}")) == []
    assert r"model & x\_y & z \\" in lines
    assert sum(line.count(r"\begin{") for line in lines) == sum(line.count(r"\end{") for line in lines)
