"""`lors` processes of their own, some of which get a signal at a chosen moment; kills by the dozen are in tests/faults.

They are forked from this one, which has imported torch and the other libraries already: that takes longer than what
most of them do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lors_cli.cli import launch
from lors_cli.cli.app import app
from lors_cli.output import console


@dataclass(frozen=True)
class Forked:
    """A process that was started, and the folder with what it says."""

    pid: int
    folder: Path
    arguments: tuple[str, ...]

    def wait(self, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Its exit code and what it said, once it is over."""
        until = time.monotonic() + timeout_s
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"{self.arguments} took more than {timeout_s} s: {self._said('stderr')}")
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        return subprocess.CompletedProcess(self.arguments, code, self._said("stdout"), self._said("stderr"))

    def _said(self, name: str) -> str:
        return (self.folder / name).read_text()


def forked(*arguments: str, first: Callable[[], None] = lambda: None, **environment: str) -> Forked:
    """Start `lors`.

    Args:
        arguments: of `lors`.
        first: what the process does before.
        environment: variables that it has besides this one's.
    """
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    pid = os.fork()
    if pid == 0:
        _be_lors(folder, arguments, first, environment)
    return Forked(pid, folder, arguments)


def _be_lors(
    folder: Path, arguments: tuple[str, ...], first: Callable[[], None], environment: dict[str, str]
) -> NoReturn:
    code: object = 70  # where a test's own part fails
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["lors", *arguments]
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.configure()
        first()
        app(arguments, prog_name="lors")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def signalled(number: signal.Signals, before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A `lors` process that gets a signal just before a file or folder of that name is renamed into place.

    Args:
        number: of the signal.
        before: part of the path.
        arguments: of `lors`.
    """

    def hook(event: str, given: tuple[object, ...]) -> None:
        if event == "os.rename" and before in str(given[1]):
            os.kill(os.getpid(), number)

    return forked(*arguments, first=lambda: sys.addaudithook(hook)).wait()


def together(number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lors` as `--nproc` does it: what the first process said, or the one that failed."""
    port = launch._free_port()
    started = [forked(*arguments, **launch._environment(rank, number, port)) for rank in range(number)]
    ended = [process.wait() for process in started]
    return next((each for each in ended if each.returncode), ended[0])
