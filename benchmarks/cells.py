"""Long benchmarks as cells: each a process of one thread, several at a time; what is there is not measured again."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Cells:
    """The cells of a folder.

    Args:
        work: holds `cells/NAME.json`, `logs/NAME.log` and what the cells make.
        command: measures the cell whose name is put after it, and hands its figures to `finish`.
    """

    work: Path
    command: tuple[str, ...]

    def file(self, name: str) -> Path:
        """Where a cell's figures lie."""
        return self.work / "cells" / f"{name}.json"

    def found(self) -> dict[str, Figures]:
        """The figures of all cells that are there, in the order of their names."""
        return {file.stem: json.loads(file.read_text()) for file in sorted((self.work / "cells").glob("*.json"))}

    def finish(self, name: str, figures: Figures) -> None:
        """Keep what a cell has measured."""
        from common import software

        from lors_cli.files import atomic

        atomic.write_json(self.file(name), {**figures, **software()})

    def run(
        self, wanted: Callable[[dict[str, Figures]], list[str]], *, jobs: int, minutes: float | None = None,
        seen: Callable[[dict[str, Figures]], None] = lambda found: None,
    ) -> bool:  # fmt: skip
        """Measure what is wanted until nothing more is; whether every cell came to its end.

        Args:
            wanted: names of cells that can begin, the first first, given the figures that are there.
            jobs: cells at a time.
            minutes: after so long no further cell begins.
            seen: is told the figures after every cell.
        """
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        running: dict[str, subprocess.Popen[bytes]] = {}
        failed: set[str] = set()
        started = time.monotonic()
        try:
            while True:
                found = self.found()
                late = minutes is not None and time.monotonic() - started > 60 * minutes
                ready = [] if late else [name for name in wanted(found) if name not in {*found, *running, *failed}]
                for name in ready[: jobs - len(running)]:
                    running[name] = self._start(name)
                if not running:
                    return not failed
                time.sleep(1)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    broke = running.pop(name).returncode != 0
                    failed |= {name} if broke else set()
                    _say(f"{name} {'FAILED' if broke else 'done'}")
                    seen(self.found())
        finally:
            for process in running.values():
                os.killpg(process.pid, signal.SIGTERM)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        _say(name)
        with (self.work / "logs" / f"{name}.log").open("ab") as words:
            return subprocess.Popen([*self.command, name], stdout=words, stderr=words, start_new_session=True,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def lors(*arguments: str, counted: Path | None = None) -> None:
    """Run a command of lors.

    Args:
        arguments: of the command line.
        counted: a file to whose number the processor's seconds are added, also of a run that is broken off.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        subprocess.run([sys.executable, "-m", "lors_cli", *arguments], check=True)
    finally:
        if counted is not None:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            counted.parent.mkdir(parents=True, exist_ok=True)
            counted.write_text(json.dumps(round(seconds_of(counted) + seconds, 1)))


def seconds_of(counted: Path) -> float:
    """What `lors` has added up."""
    return float(json.loads(counted.read_text())) if counted.is_file() else 0.0


def with_table(page: str, marks: tuple[str, str], table: Iterable[str], image: str | None = None) -> str:
    """A Markdown page with what is between its marks made anew: the table, and the link to an image."""
    before, _, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise SystemExit(f"the page has no {marks[0]} … {marks[1]}")
    shown = "\n".join(table) + (f"\n\n{image}" if image else "")
    return f"{before}{marks[0]}\n\n{shown}\n\n{marks[1]}{after}"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M')} {text}", flush=True)
