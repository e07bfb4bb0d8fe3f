"""What a person or a program reads: messages, tables, and the one JSON document; progress has a module of its own.

Human output: results on stdout, messages and progress on stderr. With --json stdout carries exactly one JSON document.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lors_cli.machine import processes
from lors_cli.output.redaction import redact

WIDTH_OF_FILES = 160
"""Characters a table may take where no terminal limits it."""


def _plain_width(out: Console) -> Console:
    if not out.is_terminal:
        out.width = WIDTH_OF_FILES
    return out


def _stream(**options: Any) -> Console:
    """A console; of several processes on one job only the first one's speaks."""
    return Console(highlight=False, emoji=False, soft_wrap=True, quiet=not processes.is_main(), **options)


@dataclass
class _State:
    is_json: bool = False
    verbosity: int = 0
    log: Console = field(default_factory=lambda: _stream(stderr=True))
    out: Console = field(default_factory=lambda: _plain_width(_stream()))


_state = _State()


def configure(*, json_mode: bool = False, verbosity: int = 0) -> None:
    """Set how this process talks; `json_mode`: stdout is for one JSON document alone.

    `verbosity`: -1 quiet, 0 usual, 1 with details, 2 with the libraries' own logs.
    """
    global _state
    _state = _State(json_mode, verbosity)


def is_json() -> bool:
    """Whether stdout is reserved for one JSON document."""
    return _state.is_json


def verbosity() -> int:
    """-1 quiet, 0 usual, 1 or 2 with more details."""
    return _state.verbosity


def terminal() -> Console | None:
    """What a live bar is drawn on; None with -q, or where the log is no terminal."""
    return _state.log if _state.verbosity >= 0 and _state.log.is_terminal else None


def info(message: str) -> None:
    """One line for the log (stderr), hidden by -q. `message` is plain text."""
    if _state.verbosity >= 0:
        _say(_state.log, message)


def detail(message: str) -> None:
    """One line for the log, shown only with -v."""
    if _state.verbosity >= 1:
        _say(_state.log, message, "dim")


def heading(message: str) -> None:
    """The start of a stage."""
    if _state.verbosity >= 0:
        _say(_state.log, message, "bold")


def warn(message: str) -> None:
    """Something the user should know; shown with -q too."""
    _say(_state.log, message, label=("warning:", "yellow"))


def error(message: str, hint: str | None = None) -> None:
    """The one message of a failed command, of whichever process it is."""
    _state.log.quiet = False
    _say(_state.log, message, label=("error:", "bold red"))
    if hint:
        _say(_state.log, f"  {hint}")


def result(text: str = "") -> None:
    """A line of a command's result on stdout (nothing with --json)."""
    if not _state.is_json:
        _say(_state.out, text)


def piece(text: str) -> None:
    """Some characters of a running text on stdout, at once and without an end of line (nothing with --json)."""
    if not _state.is_json and processes.is_main():
        sys.stdout.write(_CONTROL.sub("�", text))
        sys.stdout.flush()


def quote(text: str) -> None:
    """What was asked, above its answers on stdout (nothing with --json)."""
    if not _state.is_json:
        _say(_state.out, f"> {text}", "bold")


def passages(rows: list[tuple[str, str]]) -> None:
    """Running texts under each other on stdout, each beside its name (nothing with --json)."""
    if _state.is_json:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(f"  {name}", "cyan"), Text(redact(_CONTROL.sub("�", text))))
    _state.out.print(grid)


def path(label: str, where: Path | str, note: str = "") -> None:
    """A line on stdout that says where a result is; a link where stdout is a terminal (nothing with --json)."""
    if not _state.is_json:
        link = Style(link=Path(where).absolute().as_uri() if _state.out.is_terminal else None)
        _state.out.print(Text.assemble(f"{label} ", (str(where), link), note))


def facts(rows: list[tuple[str, str]]) -> None:
    """What a command did, a fact (name, value) a line on stdout (nothing with --json)."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        result(f"{name:{width}}  {value}")


def check(status: str, style: str, name: str, found: str, advice: str | None) -> None:
    """A line of a check-up on stdout, its one-word status in `style`, what to do below it (nothing with --json)."""
    if _state.is_json:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=6)
    grid.add_column(min_width=15, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"  {status}", style=style), Text(name), Text(found))
    if advice:
        grid.add_row("", "", Text(f"→ {advice}", style="cyan"))
    _state.out.print(grid)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal would obey rather than show, and what is no character."""


def _say(out: Console, message: str, style: str = "", label: tuple[str, str] | None = None) -> None:
    """Print plain text; a terminal gets it broken between words, and no word (a path, a command) is ever cut."""
    prefix = f"{label[0]} " if label else ""
    lines = redact(f"{prefix}{_CONTROL.sub('�', message)}").split("\n")
    if out.is_terminal:
        lines = [piece for line in lines for piece in _wrapped(line, out.width)]
    text = Text("\n".join(lines), style=style)
    if label:
        text.stylize(label[1], 0, len(label[0]))
    out.print(text)


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    if len(line) <= width or not line.strip():
        return [line]
    return textwrap.wrap(
        line, width, subsequent_indent=f"{indent}  " if indent else "  ", break_long_words=False, break_on_hyphens=False
    )


def styled(text: Text) -> None:
    """A text with styles of its own on stdout (nothing with --json)."""
    if not _state.is_json:
        _state.out.print(text)


def shows_styles() -> bool:
    """Whether stdout shows dimmed and coloured text."""
    return _state.out.color_system is not None


def document(value: Any, *, anyone: bool = False) -> None:
    """The command's JSON document on stdout, dataclasses as objects, no NaN nor infinity (nothing without --json).

    `anyone`: of several processes on one job this one speaks, though it may not be the first.
    """
    if _state.is_json and (anyone or processes.is_main()):
        text = redact(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=asdict))
        sys.stdout.write(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")  # as JSON writes it
        sys.stdout.flush()


def table(
    columns: list[str], rows: list[list[str]], *, title: str | None = None, prose: bool = False,
    bold: Collection[tuple[int, int]] = (),
) -> None:  # fmt: skip
    """A table on stdout, columns but the first right-aligned, names that are too wide folded (nothing with --json).

    Args:
        prose: the last column is running text, which may take several lines.
        bold: (row, column) of the cells that stand out.
    """
    if _state.is_json:
        return
    grid = Table(
        title=escape(title) if title else None, title_justify="left", title_style="bold", header_style="bold",
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    folds = not prose or max((len(row[0]) for row in rows), default=0) > _state.out.width // 2
    for index, name in enumerate(columns):
        wraps = folds if index == 0 else prose and index == len(columns) - 1
        grid.add_column(escape(name), justify="left" if index == 0 or wraps else "right", no_wrap=not wraps,
                        overflow="fold")  # fmt: skip
    for number, row in enumerate(rows):
        cells = (escape(cell) for cell in row)
        grid.add_row(*(f"[bold]{cell}[/bold]" if (number, place) in bold else cell for place, cell in enumerate(cells)))
    _state.out.print(grid)


def tables(columns: list[str], rows: list[list[str]], *, bold: Collection[tuple[int, int]] = ()) -> None:
    """A table on stdout in parts of at most 80 columns, each with the rows' names (nothing with --json)."""
    for number, part in enumerate(_parts(columns, rows)):
        if number:
            result()
        table([columns[place] for place in part], [[row[place] for place in part] for row in rows],
              bold={(row, part.index(place)) for row, place in bold if place in part})  # fmt: skip


def _parts(columns: list[str], rows: list[list[str]], width: int = 80) -> list[list[int]]:
    """Columns for each of several tables that fit: the first in all of them, a difference beside its model."""
    sizes = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    groups: list[list[int]] = []
    for place in range(1, len(columns)):
        if columns[place] == "Δ":
            groups[-1].append(place)
        else:
            groups.append([place])
    parts = [[0]]
    for group in groups:
        joined = [*parts[-1], *group]
        if parts[-1] == [0] or sum(sizes[place] + 2 for place in joined) - 2 <= width:
            parts[-1] = joined
        else:
            parts.append([0, *group])
    return parts


def counted(number: float, noun: str) -> str:
    """`1 epoch`, `2.5 epochs`, `300 steps`."""
    return f"{number if isinstance(number, int) else format(number, 'g')} {noun}{'' if number == 1 else 's'}"


def gib(num_bytes: float) -> str:
    """`num_bytes` for people, in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
