"""What a person or a program reads: messages, tables, progress, and the one JSON document.

Human output: results on stdout, messages and progress on stderr. With --json stdout carries exactly one
JSON document. On a terminal progress is a live bar; elsewhere it is a line now and then, also while nothing
advances, so that a log file shows that the work goes on.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
)
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from lors_cli import heartbeat
from lors_cli.machine import memory as machine_memory
from lors_cli.machine import processes
from lors_cli.redaction import redact

Mode = Literal["human", "json"]
FIRST_LINE_S = 10.0
"""After so long a step is worth a line in a file; the next ones come at `heartbeat.interval_s`."""
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
    mode: Mode = "human"
    verbosity: int = 0
    log: Console = field(default_factory=lambda: _stream(stderr=True))
    out: Console = field(default_factory=lambda: _plain_width(_stream()))


_state = _State()


def configure(*, json_mode: bool = False, verbosity: int = 0) -> None:
    """Set how this process talks.

    Args:
        json_mode: stdout is for one JSON document alone.
        verbosity: -1 quiet, 0 usual, 1 with details, 2 with the libraries' own logs.
    """
    global _state
    _state = _State(mode="json" if json_mode else "human", verbosity=verbosity)


def is_json() -> bool:
    """Whether stdout is reserved for one JSON document."""
    return _state.mode == "json"


def verbosity() -> int:
    """-1 quiet, 0 usual, 1 or 2 with more details."""
    return _state.verbosity


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
    if _state.mode == "human":
        _say(_state.out, text)


def path(label: str, where: Path | str, note: str = "") -> None:
    """A line on stdout that says where a result is; a link where stdout is a terminal (nothing with --json).

    Args:
        label: what is there (“report”).
        where: file or folder.
        note: after it.
    """
    if _state.mode == "human":
        link = Style(link=Path(where).absolute().as_uri() if _state.out.is_terminal else None)
        _state.out.print(Text.assemble(f"{label} ", (str(where), link), note))


def facts(rows: list[tuple[str, str]]) -> None:
    """What a command did, a fact a line on stdout (nothing with --json).

    Args:
        rows: name and value.
    """
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        result(f"{name:{width}}  {value}")


def check(status: str, style: str, name: str, found: str, advice: str | None) -> None:
    """A line of a check-up on stdout, what to do below it (nothing with --json).

    Args:
        status: one word.
        style: of that word.
        name: what was looked at.
        found: what was seen.
        advice: what to do, or None.
    """
    if _state.mode != "human":
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


def _escaped(character: re.Match[str]) -> str:
    """A character that may not stand in a JSON document as JSON writes it."""
    return f"\\u{ord(character[0]):04x}"


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    if len(line) <= width or not line.strip():
        return [line]
    return textwrap.wrap(
        line, width, subsequent_indent=f"{indent}  " if indent else "  ", break_long_words=False, break_on_hyphens=False
    )


def title(text: str) -> None:
    """A line above a part of a command's result on stdout (nothing with --json)."""
    if _state.mode == "human":
        _state.out.print(f"[bold]{escape(text)}[/bold]")


def styled(text: Text) -> None:
    """A text with styles of its own on stdout (nothing with --json)."""
    if _state.mode == "human":
        _state.out.print(text)


def shows_styles() -> bool:
    """Whether stdout shows dimmed and coloured text."""
    return _state.out.color_system is not None


def document(value: Any, *, anyone: bool = False) -> None:
    """The command's JSON document on stdout (nothing without --json).

    Args:
        value: JSON-serialisable; NaN and infinities are written as null by the caller.
        anyone: of several processes on one job this one speaks, though it may not be the first.
    """
    if _state.mode == "json" and (anyone or processes.is_main()):
        text = redact(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
        sys.stdout.write(_CONTROL.sub(_escaped, text) + "\n")
        sys.stdout.flush()


def table(
    columns: list[str], rows: list[list[str]], *, title: str | None = None, prose: bool = False,
    bold: Collection[tuple[int, int]] = (),
) -> None:  # fmt: skip
    """A table on stdout (nothing with --json).

    Args:
        columns: names; the first column is left-aligned, the others are right-aligned.
        rows: cells of each row.
        title: above the table.
        prose: the last column is running text, which may take several lines.
        bold: (row, column) of the cells that stand out.
    """
    if _state.mode != "human":
        return
    grid = Table(
        title=escape(title) if title else None, title_justify="left", title_style="bold", header_style="bold",
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for index, name in enumerate(columns):
        wraps = prose and index == len(columns) - 1
        grid.add_column(escape(name), justify="left" if index == 0 or wraps else "right", no_wrap=not wraps)
    for number, row in enumerate(rows):
        cells = (escape(cell) for cell in row)
        grid.add_row(*(f"[bold]{cell}[/bold]" if (number, place) in bold else cell for place, cell in enumerate(cells)))
    _state.out.print(grid)


class Task:
    """A step in progress: `advance` it, give it a `note`."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed = 0
        self.started = self._last_line = time.monotonic()
        self._start_at = 0
        self._interval_s = heartbeat.interval_s()
        self._due_s = min(FIRST_LINE_S, self._interval_s)
        self._lock = threading.Lock()
        self.bar: tuple[Progress, Any] | None = None
        self._note = ""

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count `amount` more units as done; `note` is a short text shown beside the count."""
        self.update(self.completed + amount, note)

    def update(self, completed: int, note: str | None = None) -> None:
        """Set how many units are done."""
        self.completed = completed
        if note is not None:
            self._note = note
        if self.bar is not None:
            progress, task_id = self.bar
            progress.update(task_id, completed=completed, note=self._note)
        else:
            self.beat()

    def skip(self, amount: int) -> None:
        """Units done by an earlier run: counted, but not used for the time estimate."""
        self._start_at += amount
        self.update(self.completed + amount)

    def beat(self) -> float:
        """Show a line if it is time for one, and say in how many seconds it will be time for the next."""
        with self._lock:
            waited = time.monotonic() - self._last_line
            if waited < self._due_s:
                return self._due_s - waited
            self._last_line, self._due_s = time.monotonic(), self._interval_s
            self._line()
            return self._due_s

    def _line(self) -> None:
        elapsed = self._last_line - self.started
        text = f"{self.description}: {self.completed}{f'/{self.total}' if self.total else ''} {self.unit}"
        parts = [f"{text} · {duration(elapsed)} elapsed"]
        done = self.completed - self._start_at
        if self.total and done > 0:
            parts.append(f"about {duration(elapsed / done * (self.total - self.completed))} left")
        if self._note:
            parts.append(self._note)
        parts.append(f"memory {gib(machine_memory.memory_in_use())}")
        on_gpu = machine_memory.gpu_memory_in_use()
        if on_gpu:
            parts.append(f"GPU {gib(on_gpu)}")
        info(f"  {' · '.join(parts)}")


class _Time(ProgressColumn):
    """Time taken, and about how much is left."""

    max_refresh = 0.5

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Any) -> Any:
        taken = duration(task.elapsed or 0)
        left = task.time_remaining
        if task.finished or left is None:
            return Text(taken, style="dim")
        return Text.assemble((f"{taken} · ", "dim"), (f"{duration(left)} left", "cyan"))


class _Note(ProgressColumn):
    def get_table_column(self) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", ratio=1)

    def render(self, task: Any) -> Any:
        return f"[dim]{escape(task.fields.get('note', ''))}[/dim]"


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """A long step, shown live on a terminal and as a line now and then elsewhere (docs/long-runs.md).

    Args:
        description: what is being done (“prune”).
        total: number of units, None when unknown.
        unit: their name in the plural (“blocks”).
    """
    task = Task(description, total, unit)
    if _state.verbosity < 0 or not _state.log.is_terminal:
        with heartbeat.beating(task.beat) if _state.verbosity >= 0 and processes.is_main() else nullcontext():
            yield task
        if _state.verbosity >= 0 and time.monotonic() - task.started >= FIRST_LINE_S:
            info(f"  {description}: done, {task.completed} {unit} in {duration(time.monotonic() - task.started)}")
        return
    columns = (
        TextColumn("  {task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn(unit),
        _Time(), _Note(),
    )  # fmt: skip
    with Progress(*columns, console=_state.log, transient=False, expand=True) as bar:
        task.bar = (bar, bar.add_task(description, total=total, note=""))
        yield task


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Work of unknown length: on a terminal a line that moves and then goes away, elsewhere nothing.

    Args:
        description: what is being done (“reading the model”).
    """
    if _state.verbosity < 0 or not _state.log.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), _Time())
    with Progress(*columns, console=_state.log, transient=True) as bar:
        bar.add_task(description, total=None)
        yield


def duration(seconds: float) -> str:
    """`seconds` for people: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def gib(num_bytes: float) -> str:
    """`num_bytes` for people, in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
