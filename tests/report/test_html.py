"""Pages: well-formed, self-contained, and with nothing in them that a name could smuggle in."""

from __future__ import annotations

from report_pages import Page, is_safe

from lors_cli.output.markdown import Cell, Code, Figure, Row, Table, escape, table
from lors_cli.report.drawing import Drawing
from lors_cli.report.html import to_html

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def test_texts_are_escaped_everywhere() -> None:
    rows = (
        Row((Cell(HOSTILE),), "group"),
        Row((Cell(HOSTILE), Cell(HOSTILE, HOSTILE, is_best=True))),
        Row((Cell("paper"), Cell(HOSTILE)), "detail"),
    )
    blocks = [
        f"# {escape(HOSTILE)}", escape(HOSTILE), f"## {escape(HOSTILE)}", Table(("model", HOSTILE), rows),
        table(["a", "b"], [["c", HOSTILE]], prose=True), Code(HOSTILE), Figure("f", HOSTILE),
    ]  # fmt: skip
    text = to_html(blocks, {"f": Drawing(b"", "<svg></svg>\n")})
    page = Page(text)
    assert is_safe(page)
    assert text.count("alert(1)") == sum(found.count("alert(1)") for _, found in page.texts) == 13
    assert [found for tag, found in page.texts if tag in ("title", "h1", "h2", "p")] == [HOSTILE] * 4


def test_a_table() -> None:
    rows = (
        Row((Cell("group"),), "group"),
        Row((Cell("LoRS"), Cell("41.00", "± 1.20", is_best=True))),
        Row((Cell("paper"), Cell("40.00")), "detail"),
    )
    text = to_html(["# t", Table(("model", "boolq"), rows)], {})
    assert '<tr class="group"><th scope="rowgroup" colspan="2"><span>group</span></th></tr>' in text
    assert '<tr><th scope="row"><div>LoRS</div></th><td><b>41.00</b> <small>± 1.20</small></td></tr>' in text
    assert '<tr class="detail"><th scope="row"><div>paper</div></th><td>40.00</td></tr>' in text


def test_light_and_dark_and_a_column_that_stays() -> None:
    text = to_html(["# t"], {})
    assert "prefers-color-scheme: dark" in text
    assert "position: sticky; left: 0" in text
    assert text == to_html(["# t"], {})
