"""`--nproc N`: start a command N times on this machine as one job, and end as it ends.

The processes are what torchrun would start (the same environment variables), without its own output around theirs: the
first one speaks, another only when it is the one that failed. They end with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from lors_cli.errors import INTERRUPTED, UsageError
from lors_cli.machine import processes as parallel
from lors_cli.machine.devices import threads_of_each
from lors_cli.machine.processes import LAUNCHER
from lors_cli.machine.signals import STOPPING
from lors_cli.output import console

POLL_S = 0.1
GRACE_S = {True: 60.0, False: 10.0}
"""How long the others have to end by themselves after the first one was interrupted, or failed."""


def die_with_launcher() -> None:
    """See to it that this process ends when the one that started it does; for a process that `--nproc` started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it is gone already
        os._exit(1)


def together(num_processes: int | None) -> None:
    """Do this command in several processes, where `--nproc N` asks for that and they are not started yet.

    Raises:
        UsageError: N is below 1, or torchrun has started several.
        typer.Exit: they have done it; with their exit code.
    """
    if num_processes is None or LAUNCHER in os.environ:
        return
    if num_processes < 1:
        raise UsageError(f"--nproc {num_processes}: give 1 or more.")
    if parallel.num_processes() > 1:
        raise UsageError("--nproc starts processes, and torchrun has started some.", "Use one of the two.")
    if num_processes > 1:
        raise typer.Exit(launch(parallel.own_command("lors_cli", *sys.argv[1:]), num_processes))


def launch(command: list[str], num_processes: int) -> int:
    """Run a command in several processes, and the exit code of the first that failed (0: none)."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="lors-launch-") as scratch, contextlib.ExitStack() as files:
        processes: list[subprocess.Popen[Any]] = []
        with _passing_on(processes):
            for rank in range(num_processes):
                outputs: dict[str, Any] = {
                    name: files.enter_context(open(Path(scratch, f"{name}-{rank}"), "wb"))
                    for name in (("stdout", "stderr") if rank else ())  # the first one speaks for itself
                }
                processes.append(
                    subprocess.Popen(
                        [*command], env=_environment(rank, num_processes, port), stdin=subprocess.DEVNULL,
                        start_new_session=True, **outputs,
                    )
                )  # fmt: skip
            failed = _wait(processes)
        if failed is None:
            return 0
        return _report(failed, processes[failed].returncode, Path(scratch))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What torchrun would set, and threads so that all processes together have the machine's cores."""
    usual = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {
        **usual, **os.environ, **threads_of_each(num_processes),
        LAUNCHER: str(os.getpid()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }  # fmt: skip


@contextlib.contextmanager
def _passing_on(processes: list[subprocess.Popen[Any]]) -> Iterator[None]:
    """Pass every Ctrl-C and a scheduler's signals on; from the third Ctrl-C on processes are killed."""
    count = 0

    def pass_on(number: int, frame: Any) -> None:
        nonlocal count
        count += number == signal.SIGINT
        for process in processes:
            if process.poll() is None:
                process.send_signal(number if count < 3 else signal.SIGKILL)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, *STOPPING)}
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for each, handler in before.items():
            signal.signal(each, handler)


def _wait(processes: list[subprocess.Popen[Any]]) -> int | None:
    """The number of the process that failed first, None if none did; the others are over too, or had their time."""
    failed, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if failed is None:
            failed = _failed(processes)
            if failed is not None:
                deadline = time.monotonic() + GRACE_S[processes[failed].returncode == INTERRUPTED]
        time.sleep(POLL_S)
    return _failed(processes) if failed is None else failed


def _failed(processes: list[subprocess.Popen[Any]]) -> int | None:
    """A process that failed, if there is one: rather one that was killed than those that missed it."""
    found = [number for number, process in enumerate(processes) if process.poll()]
    return min(found, key=lambda number: processes[number].returncode > 0, default=None)


def _report(failed: int, code: int, scratch: Path) -> int:
    """Show what a failed process had to say, and its exit code as a shell would have it."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        for file in sorted(scratch.glob(f"{name}-*")):
            with open(file, encoding="utf-8", errors="replace") as said:
                shutil.copyfileobj(said, stream)
        stream.flush()
    if code >= 0:
        return code
    if -code in (signal.SIGINT, *STOPPING):  # before it could say so
        return INTERRUPTED
    killed = code == -signal.SIGKILL
    console.error(
        f"process {failed} was killed by signal {-code}{'; is memory short?' if killed else ''}",
        "The same command resumes from there.",
    )
    return 4 if killed else 1
