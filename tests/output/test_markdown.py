"""Blocks in Markdown."""

from __future__ import annotations

import pytest

from lors_cli.output.markdown import Cell, Code, Figure, Row, Table, escape, table, to_markdown, unescape


def test_a_table() -> None:
    rows = (
        Row((Cell("Llama | 2"),), "group"),
        Row((Cell("LoRS"), Cell("41.00", "± 1.20", is_best=True), Cell("–"))),
        Row((Cell("paper"), Cell("40.00", "(+1.00)"), Cell(""))),
        Row((Cell("paper"), Cell("40.00"), Cell("")), "detail"),
    )
    assert to_markdown([Table(("model", "boolq", "rte"), rows)]).splitlines() == [
        "| model | boolq | rte |",
        "| :-- | --: | --: |",
        r"| **Llama \| 2** |  |  |",
        "| LoRS | **41.00** ± 1.20 | – |",
        "| paper | 40.00 (+1.00) |  |",
        "| ↳ paper | 40.00 |  |",
    ]


def test_running_text_is_left_aligned() -> None:
    assert to_markdown([table(["cell", "error"], [["a", "b"]], prose=True)]).splitlines()[1] == "| :-- | :-- |"


def test_cells_are_escaped() -> None:
    found = to_markdown([table(["a", "b"], [["x|y", "`z`"], ["<b>&amp;", "two\nlines"]])])
    assert found.splitlines()[2:] == [r"| x\|y | \`z\` |", r"| \<b\>\&amp; | two lines |"]


@pytest.mark.parametrize(
    "text", ["plain", r"a\b", "*x* _y_ `z` [l](u) <b> | # & ~", "<script>", r"\\|", r"a\_b \\_ _", "__a__b_"]
)
def test_unescape_undoes_escape(text: str) -> None:
    assert unescape(escape(text)) == text


def test_underscores_at_the_ends_of_words_are_no_markup() -> None:
    assert escape("def __init__(self_, _x): arc_easy a__b _ é_é") == (
        r"def \_\_init\_\_(self\_, \_x): arc_easy a__b \_ é_é"
    )


def test_code_cannot_end_its_fence() -> None:
    assert to_markdown([Code("a\n````\nb\n", "yaml")]) == "`````yaml\na\n````\nb\n`````\n"


def test_a_figure() -> None:
    assert to_markdown(["# t", Figure("loss", "a [b]")]) == "# t\n\n![a \\[b\\]](figures/loss.png)\n"
