"""A report's files: Markdown and HTML of the same blocks, CSV and LaTeX of the same models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lors_cli.files import atomic
from lors_cli.output.markdown import Block, to_markdown, unescape
from lors_cli.report import FORMATS
from lors_cli.report.comparison import notes, results_table
from lors_cli.report.drawing import Drawing, draw_all
from lors_cli.report.html import to_html
from lors_cli.report.latex import to_latex
from lors_cli.report.measures import Group
from lors_cli.report.records import to_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

View = TypeVar("View")


def write_files(
    folder: Path,
    formats: Collection[str],
    *,
    view: View,
    figures: Mapping[str, Callable[[View], Figure | None]],
    blocks: Callable[[Collection[str]], list[Block]],
    groups: Sequence[Group],
    caption: str,
) -> list[Path]:
    """Write `report.<format>` and, for Markdown, `figures/*.png`; files that already say so are left alone.

    Args:
        folder: of the run or sweep.
        formats: of `FORMATS`.
        view: what the figures draw.
        figures: every figure that there may be.
        blocks: from the names of the figures that could be drawn to the report.
        groups: the models of the tables.
        caption: begins the LaTeX table's caption.

    Returns:
        The reports' paths, in the order of `FORMATS`.
    """
    drawings = draw_all(figures, view) if {"md", "html"} & set(formats) else {}
    if "md" in formats:
        _write_figures(folder / "figures", figures, drawings)
    written = []
    for kind in FORMATS:
        if kind not in formats:
            continue
        path = folder / f"report.{kind}"
        if kind == "md":
            text = to_markdown(blocks(drawings))
        elif kind == "html":
            text = to_html(blocks(drawings), drawings)
        elif kind == "csv":
            text = to_csv(groups)
        else:
            said = unescape(" ".join([caption, *notes(groups)]))
            text = to_latex([replace(results_table(groups), caption=said)])
        _write(path, text.encode("utf-8"))
        written.append(path)
    return written


def _write_figures(folder: Path, names: Collection[str], drawings: Mapping[str, Drawing]) -> None:
    for name in names:
        path = folder / f"{name}.png"
        if name in drawings:
            _write(path, drawings[name].png)
        else:
            path.unlink(missing_ok=True)  # left by earlier results in the same folder


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        atomic.write_bytes(path, content)
