"""Long steps: a live bar on a terminal; elsewhere a line now and then, also while nothing advances.

So a log file shows that the work goes on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

from lors_cli.errors import UsageError
from lors_cli.machine import memory as heap
from lors_cli.machine import processes
from lors_cli.output import console

VARIABLE = "LORS_HEARTBEAT_S"
DEFAULT_S = 60.0
FIRST_LINE_S = 10.0
"""After so long a step is worth a line in a file; the next ones come at `interval_s`."""


_listeners: ContextVar[tuple[Callable[[Task], None], ...]] = ContextVar("listeners", default=())


def interval_s() -> float:
    """Seconds between lines: $LORS_HEARTBEAT_S, else 60."""
    return seconds_of(VARIABLE, DEFAULT_S)


def seconds_of(variable: str, default: float) -> float:
    """The seconds that an environment variable gives, else `default`."""
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < threading.TIMEOUT_MAX:
        raise UsageError(f"${variable} is {text}; it must be a number of seconds above 0.")
    return value


@contextmanager
def on_progress(listener: Callable[[Task], None]) -> Iterator[None]:
    """Within this context `listener` is called each time that a long step moves, with the step (a `Task`).

    Long steps are those that show a bar on a terminal. An exception of the listener ends the work.
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


class Task:
    """A step in progress: so many (`completed`) of `total` units (None: unknown) are done, and a `note` on it."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed = 0
        self._listeners = _listeners.get()
        self.started = self._last_line = time.monotonic()
        self._start_at = 0
        self._interval_s = interval_s()
        self._due_s = min(FIRST_LINE_S, self._interval_s)
        self._lock = threading.Lock()
        self.bar: tuple[Progress, Any] | None = None
        self.note = ""

    def __repr__(self) -> str:
        """Such as <Task prune 3/30 blocks>."""
        return f"<Task {self.description} {self.completed}{f'/{self.total}' if self.total else ''} {self.unit}>"

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count `amount` more units as done; `note` is a short text shown beside the count."""
        self.update(self.completed + amount, note)

    def update(self, completed: int, note: str | None = None) -> None:
        """Set how many units are done."""
        self.completed = completed
        if note is not None:
            self.note = note
        self.tell()
        if self.bar is not None:
            bar, task_id = self.bar
            bar.update(task_id, completed=completed, note=self.note)
        else:
            self.beat()

    def tell(self) -> None:
        """Call those who listen (`on_progress`)."""
        for listener in self._listeners:
            listener(self)

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
        if self.note:
            parts.append(self.note)
        parts.append(f"memory {console.gib(heap.memory_in_use())}")
        on_gpu = heap.gpu_memory_in_use()
        if on_gpu:
            parts.append(f"GPU {console.gib(on_gpu)}")
        console.info(f"  {' · '.join(parts)}")


class _Time(ProgressColumn):
    """Time taken, and about how much is left."""

    max_refresh = 0.5

    def render(self, task: Any) -> Any:
        taken = duration(task.elapsed or 0)
        left = task.time_remaining
        if task.finished or left is None:
            return Text(taken, style="dim")
        return Text.assemble((f"{taken} · ", "dim"), (f"{duration(left)} left", "cyan"))


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """A long step, shown live on a terminal and as a line now and then elsewhere (docs/long-runs.md).

    `description` is such as “prune”; of `total` units (None: unknown), in the plural such as “blocks”.
    """
    task, terminal = Task(description, total, unit), console.terminal()
    task.tell()
    if terminal is None:
        with _beating(task.beat) if console.verbosity() >= 0 and processes.is_main() else nullcontext():
            yield task
        elapsed_s = time.monotonic() - task.started
        if elapsed_s >= FIRST_LINE_S:
            console.info(f"  {description}: done, {task.completed} {unit} in {duration(elapsed_s)}")
        return
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        TextColumn("  {task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=30)),
        BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn(unit),
        _Time(Column(no_wrap=True)), TextColumn("{task.fields[note]}", "dim", markup=False, table_column=rest),
    )  # fmt: skip
    with Progress(*columns, console=terminal, transient=False, expand=True) as bar:
        task.bar = (bar, bar.add_task(description, total=total, note=""))
        yield task


@contextmanager
def _beating(beat: Callable[[], float]) -> Iterator[None]:
    """Call `beat`, which returns the seconds until its next call, from a thread for as long as the context lasts."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(beat()):
            pass

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Work of unknown length: on a terminal a line that moves and then goes away, elsewhere nothing."""
    terminal = console.terminal()
    if terminal is None:
        yield
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), _Time(Column(no_wrap=True)), console=terminal, transient=True
    ) as bar:
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
