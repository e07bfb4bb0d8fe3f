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
from pathlib import Path
from typing import Any, NoReturn

from lors_cli.cli import launch
from lors_cli.cli.app import app
from lors_cli.output import console


class Forked:
    """A process that was started, as `subprocess.Popen` shows one, and the folder with what it says."""

    def __init__(self, pid: int, folder: tempfile.TemporaryDirectory[str], arguments: tuple[str, ...]) -> None:
        self.pid, self.folder, self.args = pid, folder, arguments
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it is over."""
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float = 300.0) -> int:
        """Its exit code."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout, stderr=self._said("stderr"))
            time.sleep(0.02)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        """Unless it is over."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def completed(self) -> subprocess.CompletedProcess[str]:
        """Exit code and what it said, once it is over."""
        try:
            self.wait()
        finally:
            self.kill()
        return subprocess.CompletedProcess(self.args, self.wait(), self._said("stdout"), self._said("stderr"))

    def _said(self, name: str) -> str:
        return Path(self.folder.name, name).read_text()


def forked(
    *arguments: str, first: Callable[[], None] = lambda: None, said: Path | None = None, **environment: str
) -> Forked:
    """Start `lors`.

    Args:
        arguments: of `lors`.
        first: what the process does before.
        said: the file that everything it says is put at the end of, in place of one for stdout and one for stderr.
        environment: variables that it has besides this one's.
    """
    folder = tempfile.TemporaryDirectory(prefix="forked-")  # removed with the object that has it
    pid = os.fork()
    if pid == 0:
        files = [said or Path(folder.name, name) for name in ("stdout", "stderr")]
        _be_lors(files, arguments, first, environment)
    return Forked(pid, folder, arguments)


def _be_lors(
    said: list[Path], arguments: tuple[str, ...], first: Callable[[], None], environment: dict[str, str]
) -> NoReturn:
    code: object = 70  # where a test's own part fails
    try:
        for number, file in enumerate(said, 1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
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

    return forked(*arguments, first=lambda: sys.addaudithook(hook)).completed()


def together(number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lors` as `--nproc` does it: what the first process said, or the one that failed."""
    port = launch._free_port()
    started = [forked(*arguments, **launch._environment(rank, number, port)) for rank in range(number)]
    ended = [process.completed() for process in started]
    return next((each for each in ended if each.returncode), ended[0])


def command(*arguments: str) -> subprocess.Popen[str]:
    """Start `lors` as a shell does, in a process that imports all anew."""
    return subprocess.Popen(
        [sys.executable, "-m", "lors_cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(found: Callable[[], Any], seconds: float = 240.0) -> Any:
    """The first value that is not None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (value := found()) is not None:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come")
