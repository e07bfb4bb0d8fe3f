"""One process at a time in a folder: the kernel's lock on `.lock`, and in that file who holds it and since when.

The kernel's lock goes with the process that holds it, however that ended. The file's text says what the kernel cannot:
whose the folder is, for the one message of a second run, and on a file system shared by several machines whether the
owner is on another one, of whose end nothing is known here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from lors_cli.errors import UsageError
from lors_cli.output import console

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
_SAME_START_S = 5.0
"""Starts of one process are told apart by at most this, since the machine's clock may have been set between."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder.

    Args:
        pid: the process.
        started: when it started, in seconds since 1970: a number that is used again is another process.
        host: the machine's name.
        boot: what names the running kernel, "" where nothing does.
        since: when the folder was taken, for people.
    """

    pid: int
    started: float
    host: str
    boot: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        """This one, from now on."""
        import psutil

        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(os.getpid(), psutil.Process().create_time(), socket.gethostname(), _boot(), since)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def is_elsewhere(self) -> bool:
        """Whether it is on another machine; a container is its host's, and a machine that was started again its own."""
        return self.host != socket.gethostname() and (not self.boot or self.boot != _boot())

    def is_running(self) -> bool:
        """Whether the process, on this machine, has not ended."""
        import psutil

        if self.boot != _boot():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < _SAME_START_S
        except psutil.Error:
            return False


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; what a killed one has left of its hold is taken over, with a line in the log.

    Args:
        folder: made when missing.

    Raises:
        UsageError: another process holds it, or one of another machine did not give it back.
    """
    file, is_locked = _open_locked(folder)
    with file:
        earlier = _read(file)
        if earlier is not None:
            _check_gone(folder, earlier, is_locked)
            console.info(f"  {folder}: taken over from {earlier}, which ended without giving it back")
        _write(file, json.dumps(asdict(Owner.this_process())))
        try:
            yield
        finally:
            _write(file, "")


def _open_locked(folder: Path) -> tuple[IO[str], bool]:
    """The folder's lock file, open, and whether the kernel has locked it."""
    path = folder / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _read(file)
            if error.errno in _NO_LOCKS:
                console.warn(f"{folder}: this file system has no locks; do not start a second run there")
                return file, False
            file.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise UsageError(
                f"{folder} is in use by {owner or 'another process'}.", "Wait for it to end, or choose another --out."
            ) from None
        if _is_there(path, file):
            return file, True
        file.close()  # its folder was removed, and perhaps made anew, between opening and locking


def _is_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _check_gone(folder: Path, owner: Owner, is_locked: bool) -> None:
    """Refuse a folder whose owner may still be at work though the kernel gave us the lock."""
    if owner.is_elsewhere():
        raise UsageError(
            f"{folder} is in use by {owner}, or was when that process was killed: it is another machine.",
            f"If it has ended, remove {folder / LOCK_NAME} and start this command again.",
        )
    if not is_locked and owner.pid != os.getpid() and owner.is_running():
        raise UsageError(f"{folder} is in use by {owner}.", "Wait for it to end, or choose another --out.")


def _read(file: IO[str]) -> Owner | None:
    """The owner that the file names; None when it names none, or was being written when its process was killed."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _boot() -> str:
    """What names the running kernel: drawn at its start, the same in all containers on it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""
