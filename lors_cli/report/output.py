"""A report's parts and its files: Markdown and HTML of the same blocks, CSV and LaTeX of the same models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lors_cli.errors import UsageError, did_you_mean
from lors_cli.files import atomic
from lors_cli.output.markdown import Block, Figure, escape, table, to_markdown, unescape
from lors_cli.report.drawing import Draw, draw_all
from lors_cli.report.html import to_html
from lors_cli.report.latex import to_latex
from lors_cli.report.measures import Group
from lors_cli.report.records import to_csv
from lors_cli.report.scores import by_model, notes

FORMATS = ("md", "html", "csv", "tex")


def check_formats(formats: Collection[str]) -> None:
    """Raise UsageError, naming the nearest one, when a format is none of `FORMATS`."""
    for name in formats:
        if name not in FORMATS:
            raise UsageError(
                f"--format {name} is none of {', '.join(FORMATS)}.", did_you_mean(name, FORMATS, cutoff=0.5)
            )


def assemble(title: str, lead: Sequence[Block], sections: Mapping[str, Sequence[Block]]) -> list[Block]:
    """The whole report; a section of nothing is left out."""
    blocks: list[Block] = [f"# {escape(title)}", *lead]
    for heading, content in sections.items():
        blocks += [f"## {heading}", *content] if content else []
    return blocks


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False) -> list[Block]:
    """A table; nothing when it has no rows."""
    return [table(columns, rows, prose=prose)] if rows else []


def pictures(captions: Mapping[str, str], drawn: Collection[str]) -> list[Block]:
    """The figures among these that were drawn; `captions` is by name."""
    return [Figure(name, caption) for name, caption in captions.items() if name in drawn]


def write_files(
    folder: Path, formats: Collection[str], *, figures: Mapping[str, Draw],
    blocks: Callable[[Collection[str]], list[Block]], groups: Sequence[Group], caption: str,
) -> list[Path]:  # fmt: skip
    """Write `report.<format>` and, for Markdown, `figures/*.png`; files that already say so are left alone.

    Args:
        blocks: from the names of the figures that could be drawn to the report.
        groups: the models of the tables.
        caption: begins the LaTeX table's caption.

    Returns:
        The reports' paths, in the order of `FORMATS`.
    """
    drawings = draw_all(figures) if {"md", "html"} & set(formats) else {}
    for name in figures if "md" in formats else ():
        path = folder / "figures" / f"{name}.png"
        if name in drawings:
            _write(path, drawings[name].png)
        else:
            path.unlink(missing_ok=True)  # left by earlier results in the same folder
    said = unescape(" ".join([caption, *notes(groups)]))
    texts = {
        "md": lambda: to_markdown(blocks(drawings)),
        "html": lambda: to_html(blocks(drawings), drawings),
        "csv": lambda: to_csv(groups),
        "tex": lambda: to_latex([replace(by_model(groups), caption=said)]),
    }
    paths = {kind: folder / f"report.{kind}" for kind in FORMATS if kind in formats}
    for kind, path in paths.items():
        _write(path, texts[kind]().encode("utf-8"))
    return list(paths.values())


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        atomic.write_bytes(path, content)
