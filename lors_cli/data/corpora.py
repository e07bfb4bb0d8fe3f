"""Rows of known corpora: WikiText-2 as one document, by the papers' join or another; parts of SlimPajama."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lors_cli.data.layouts import TEXT, Row
from lors_cli.data.text_files import read_rows, read_text
from lors_cli.errors import UsageError
from lors_cli.output import console

HUB_ROWS = 4358
"""Of the test split on the hub, blank ones included."""


def joined_rows(rows: Iterable[str]) -> str:
    """All rows of the hub's table, blank ones too, two newlines between them.

    Source: SparseGPT's and Wanda's code, `get_wikitext2`; arXiv:2301.00774, arXiv:2306.11695.
    """
    return "\n\n".join(rows)


def joined_lines(rows: Iterable[str]) -> str:
    """The rows that are not blank, in a line each."""
    return "\n".join(row.rstrip("\n") for row in rows if row.strip())


def local_rows(path: Path, *, blank_count: bool) -> list[str]:
    """The rows of a local copy as the hub has them: with their newline, blank ones empty.

    Args:
        blank_count: whether the result depends on the blank rows; it is then said that some are not there.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    if blank_count and len(lines) != HUB_ROWS:
        console.warn(
            f"{path} has {len(lines):,} rows and the hub's table {HUB_ROWS:,}, so the perplexity of wikitext2 differs "
            "from the papers'; wikitext2-lines does not depend on the blank rows."
        )
    return [f"{line}\n" if line.strip() else "" for line in lines]


def subset_rows(path: Path, subset: str) -> Iterator[Row]:
    """Rows of one part of a file in SlimPajama's schema."""
    found = False
    for row in read_rows(path, TEXT, only=lambda value: _set_name(value) == subset):
        found = True
        yield row
    if not found:
        raise UsageError(f"{path} has no row whose meta.redpajama_set_name is {subset}.")


def _set_name(value: dict[str, Any]) -> Any:
    meta = value.get("meta")
    return meta.get("redpajama_set_name") if isinstance(meta, dict) else None
