"""`lors` processes of their own that get a signal at a chosen moment; kills by the dozen are in tests/faults."""

from __future__ import annotations

import signal
import subprocess
import sys

SIGNALLED = """
import os, signal, sys
number, wanted = int(sys.argv[1]), sys.argv[2]
def hook(event, arguments):
    if event == "os.rename" and wanted in str(arguments[1]):
        os.kill(os.getpid(), number)
sys.addaudithook(hook)
from lors_cli.cli.app import app
app(sys.argv[3:], prog_name="lors")
"""


def signalled(number: signal.Signals, before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A `lors` process that gets a signal just before a file or folder of that name is renamed into place.

    Args:
        number: of the signal.
        before: part of the path.
        arguments: of `lors`.
    """
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(number)), before, *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
