"""One process at a time in a folder: the kernel's lock on `.lock`, and in that file who holds it and since when.

Within one running kernel, its containers too, the lock alone tells the truth: it goes with the process that holds it,
however that ended. The file's text is for people, and for two cases where the kernel does not know. A file system that
several machines share may keep locks on each machine alone (Lustre with localflock, NFS with local_lock, BeeGFS, most
of FUSE): the owner's host and boot say whether it is on another machine, of whose end nothing is known here. And where
a file system has no locks at all, the owner's process is looked for.
"""

from __future__ import annotations

import calendar
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from lors_cli.errors import UsageError
from lors_cli.output import console

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
_TIME = "%Y-%m-%d %H:%M:%S UTC"
_CLOCK_S = 5.0
"""A process that seems to be so much younger than its hold may still be the owner: the machine's clock may be set."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder; `boot` names the running kernel, "" where nothing does."""

    pid: int
    host: str
    boot: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        """This one, from now on."""
        return cls(os.getpid(), socket.gethostname(), _boot(), time.strftime(_TIME, time.gmtime()))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def is_elsewhere(self) -> bool:
        """Whether it is on another machine; a container is its host's, and a machine that was started again its own."""
        return self.host != socket.gethostname() and (not self.boot or self.boot != _boot())

    def is_running(self) -> bool:
        """Whether the process, on this machine, has not ended; one that has its number but is younger is another."""
        import psutil

        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.Error:
            return False
        return started < calendar.timegm(time.strptime(self.since, _TIME)) + _CLOCK_S


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder, made when missing; what a killed process left of its hold is taken over, with a line in the log.

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
        if is_there(path, file):
            return file, True
        file.close()  # its folder was removed, and perhaps made anew, between opening and locking


def is_there(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still what lies at `path`."""
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
        known = json.loads(file.read())
        return Owner(**{field.name: known[field.name] for field in fields(Owner)})
    except (ValueError, TypeError, KeyError):
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
