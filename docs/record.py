"""Runs commands and draws what they said, at a higher speed, as an SVG: `python docs/record.py OUT.svg 'COMMAND' …`.

Nothing is made up: the lines are those that the commands wrote, each at its own time divided by SPEED. Where a picture
is not animated, all of them are there.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

WIDTH = 96
SPEED = 60
LONGEST_S = 1.2
"""Between two lines of the picture, in seconds."""
HOLD_S = 8
"""That the last line stays before the picture begins anew."""


def main() -> None:
    """Run the commands one after the other and write the picture."""
    out, *commands = sys.argv[1:]
    lines: list[tuple[float, Text]] = []
    now = 0.0
    for command in commands:
        lines.append((now := now + 0.8, Text(f"$ {command}", "bold green")))
        for waited, line in spoken(command):
            now += min(waited / SPEED + 0.06, LONGEST_S)
            lines += [(now, part) for part in Text(line).wrap(Console(), WIDTH, tab_size=8)] or [(now, Text(""))]
    picture = Console(record=True, width=WIDTH, file=io.StringIO())
    for _, line in lines:
        picture.print(line, highlight=False)
    svg = picture.export_svg(title="lors", theme=MONOKAI)
    Path(out).write_text(animated(svg, [when for when, _ in lines]), encoding="utf-8")


def spoken(command: str) -> list[tuple[float, str]]:
    """What a command writes, line by line, each with the seconds it was waited for."""
    said: list[tuple[float, str]] = []
    since = time.monotonic()
    with subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append((time.monotonic() - since, line.rstrip()))
            since = time.monotonic()
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}\n" + "\n".join(line for _, line in said))
    return said


def animated(svg: str, times: list[float]) -> str:
    """The picture with each line of it appearing at its time, over and over."""
    whole = times[-1] + HOLD_S
    rules = []
    for number, when in enumerate(times):
        share = 100 * when / whole
        rules.append(
            f"@keyframes line{number} {{0%, {share:.2f}% {{opacity: 0}} {share + 0.01:.2f}%, 100% {{opacity: 1}}}}"
        )
        rules.append(f".at{number} {{animation: line{number} {whole:.1f}s infinite}}")
    svg = re.sub(r"@font-face \{[^}]*\}\s*", "", svg)  # of a server elsewhere
    svg = svg.replace("</style>", "\n".join(rules) + "\n</style>", 1)
    return re.sub(r"<text class=\"([^\"]*)\"([^>]*clip-path=\"url\(#[^)]*-line-(\d+)\)\")",
                  lambda found: f'<text class="{found[1]} at{found[3]}"{found[2]}', svg)  # fmt: skip


if __name__ == "__main__":
    main()
