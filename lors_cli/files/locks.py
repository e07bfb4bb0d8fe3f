"""One process at a time in a folder: `.lock` lies there while one is at work, and says who and since when.

The file is made by exclusive creation, which every file system does for one process alone. Within one running kernel,
its containers too, the kernel's lock on it tells whether the holder still is: that goes with its process, however it
ended. Where a file system has no locks the owner's process is looked for. Of a process on another machine nothing is
known here, and many shared file systems keep locks on each machine alone (Lustre with localflock, NFS with local_lock,
BeeGFS, most of FUSE): so the holder renews the file's time, and one that has given no sign of life for its lease, by
the file system's clock, has lost the folder to whoever asks for it next. Should it come back, it finds that out before
it publishes anything (`check`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from lors_cli.errors import UsageError
from lors_cli.files.owners import Owner, read_owner
from lors_cli.output import console, progress

LOCK_NAME = ".lock"
SIGNS = 6
"""Signs of life in a lease."""
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
_WRITING_S = 0.05
"""An empty file older than this is not being written by another machine, but was left by a killed process."""


class InUseError(UsageError):
    """Another process holds the folder."""


@contextmanager
def hold(folder: Path, *, wait_s: float | None = None, patience_s: float = math.inf) -> Iterator[None]:
    """Hold a folder, made when missing; what a dead process left of its hold is taken over, with a line in the log.

    Args:
        folder: to hold.
        wait_s: seconds between looks whether one that is in use is free; None: it is refused.
        patience_s: after so long it is refused all the same.

    Raises:
        UsageError: another process holds it; or, at the next step of a long task, it has taken it over meanwhile.
    """
    held = _waited(folder, wait_s, patience_s)
    place = folder.resolve()
    _held[place] = held
    try:
        with held.signs(), progress.on_progress(lambda task: held.look()):
            yield
    finally:
        del _held[place]
        held.release()


def check(folder: Path) -> None:
    """Make sure that nobody has taken over what this process holds of `folder` and the folders around it.

    Raises:
        UsageError: somebody has.
    """
    place = folder.resolve()
    for around in (place, *place.parents):
        if around in _held:
            _held[around].check()


def holder(folder: Path) -> Owner | None:
    """Who is at work in a folder, as far as can be seen without touching it."""
    try:
        with open(folder / LOCK_NAME, encoding="utf-8") as file:
            owner, renewed = read_owner(file), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    if owner is None or not owner.is_elsewhere():
        return owner if owner is not None and owner.is_running() else None
    return owner if time.time() - renewed < owner.lease_s else None


# One that is held -----------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """A folder that this process holds."""

    folder: Path
    file: IO[str]
    owner: Owner
    _seen: float = field(default_factory=time.monotonic)
    """When it was last seen to be ours."""

    def is_ours(self) -> bool:
        """Whether nobody has taken it over; one that was removed with its folder is nobody's."""
        try:
            with open(self.folder / LOCK_NAME, encoding="utf-8") as file:
                ours = read_owner(file) == self.owner
        except (FileNotFoundError, NotADirectoryError):
            return not self.folder.is_dir()
        self._seen = time.monotonic()
        return ours

    def check(self) -> None:
        """Raise a UsageError when it has been taken over."""
        with contextlib.suppress(OSError):  # of a file that is not there any more
            os.utime(self.file.fileno())  # first: whoever looks after this finds it alive
        if not self.is_ours():
            now = holder(self.folder)
            raise UsageError(
                f"{self.folder} is no longer held by this process, which gave no sign of life for "
                f"{progress.duration(self.owner.lease_s)}: {now or 'another process'} has taken it over.",
                "Nothing more is written here. The other one goes on from what was finished.",
            )

    def look(self) -> None:
        """`check`, when the last one is long ago."""
        if time.monotonic() - self._seen > self._interval_s:
            self.check()

    @property
    def _interval_s(self) -> float:
        return self.owner.lease_s / SIGNS

    @contextmanager
    def signs(self) -> Iterator[None]:
        """Renew the lock file's time, by the file system's clock, for as long as the context lasts."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(self._interval_s):
                with contextlib.suppress(OSError):  # a server that is away for a moment; the next one may come through
                    os.utime(self.file.fileno())

        thread = threading.Thread(target=run, name=f"lease of {self.folder}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def release(self) -> None:
        """Give it back, unless it is another's by now."""
        with self.file:
            if self.is_ours():
                (self.folder / LOCK_NAME).unlink(missing_ok=True)


_held: dict[Path, _Held] = {}
"""By the folder's resolved path."""


# Taking one -----------------------------------------------------------------------------------------------------


def _waited(folder: Path, wait_s: float | None, patience_s: float) -> _Held:
    told, until = False, time.monotonic() + patience_s
    while True:
        try:
            return _take(folder)
        except InUseError as error:
            if wait_s is None or time.monotonic() > until:
                raise
            if not told and wait_s >= 1:
                console.info(f"  waiting: {error.message}")
                told = True
        time.sleep(wait_s)


def _take(folder: Path) -> _Held:
    """Make the folder's lock file, that of a dead owner moved out of the way before."""
    path = folder / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "x+", encoding="utf-8")  # noqa: SIM115 - closed when it is given back
        except FileExistsError:
            _clear(folder)
            continue
        except FileNotFoundError:
            continue  # the folder was removed in this moment
        try:
            locked = lock(file)
        except BaseException:
            file.close()
            raise
        if locked is None:
            console.warn(f"{folder}: this file system has no locks; do not start a second run there")
        if locked is not False and is_there(path, file):
            owner = Owner.this_process()
            file.write(json.dumps(asdict(owner)))
            file.flush()
            held = _Held(folder, file, owner)
            if held.is_ours():  # and not seen empty by another machine, which took it for a dead one's
                return held
        file.close()


def lock(file: IO[str], operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool | None:
    """Whether the kernel locks an open file for us; None where the file system has no locks.

    Args:
        operation: as for `fcntl.flock`.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _clear(folder: Path) -> None:
    """Move the lock file of a dead owner out of the way, or refuse the folder."""
    path = folder / LOCK_NAME
    try:
        file = open(path, "r+", encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        locked, owner = lock(file), read_owner(file)
        if owner is None:
            time.sleep(_WRITING_S)
            owner = read_owner(file)
        if not is_there(path, file):
            return
        renewed = os.fstat(file.fileno()).st_mtime
        how = _death(folder, owner, locked, renewed)
        if _move_away(path, owner, renewed) and owner is not None:
            console.info(f"  {folder}: taken over from {owner}, {how}")


def _death(folder: Path, owner: Owner | None, locked: bool | None, renewed: float) -> str:
    """How a folder's owner came to its end.

    Raises:
        InUseError: it is at work, as far as can be known here.
    """
    if owner is not None and owner.is_elsewhere():
        silent_s = _clock(folder) - renewed
        if silent_s < owner.lease_s:
            raise InUseError(
                f"{folder} is in use by {owner}.",
                f"It is another machine, whose last sign of life is {progress.duration(silent_s)} old. After "
                f"{progress.duration(owner.lease_s)} without one this command takes over. Or, if it has ended, remove "
                f"{folder / LOCK_NAME} and start this command again.",
            )
        return f"which has given no sign of life for {progress.duration(silent_s)}"
    is_mine = any(held.owner == owner for held in _held.values())
    is_alive = is_mine or (owner is not None and owner.pid != os.getpid() and owner.is_running())
    if locked is False or (locked is None and is_alive):
        raise InUseError(
            f"{folder} is in use by {owner or 'another process'}.", "Wait for it to end, or choose another --out."
        )
    return "which ended without giving it back"


def _move_away(path: Path, dead: Owner | None, renewed: float) -> bool:
    """Remove a lock file that is still what it was when it was judged; another's, or one that was renewed meanwhile, is
    put back."""
    aside = path.with_name(f"{LOCK_NAME}.{uuid.uuid4().hex}.partial")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    with open(aside, encoding="utf-8") as file:
        is_same = read_owner(file) == dead and os.fstat(file.fileno()).st_mtime == renewed
    if is_same:
        aside.unlink()
    else:
        os.rename(aside, path)  # one that was made in between is found out by its owner's `check`
    return is_same


def _clock(folder: Path) -> float:
    """The time by the clock of the file system that a folder lies on."""
    probe = folder / f"{LOCK_NAME}.{uuid.uuid4().hex}.partial"
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def is_there(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still what lies at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
