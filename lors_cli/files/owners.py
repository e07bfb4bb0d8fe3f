"""Who holds a folder: what a lock file says of its owner, and what can be told of that here."""

from __future__ import annotations

import calendar
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

from lors_cli.output import progress

VARIABLE = "LORS_LEASE_S"
LEASE_S = 180.0
_TIME = "%Y-%m-%d %H:%M:%S UTC"
_CLOCK_S = 5.0
"""A process that seems to be so much younger than its hold may still be the owner: the machine's clock may be set."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder.

    `boot` names the running kernel, "" where nothing does.
    """

    pid: int
    host: str
    boot: str
    since: str
    lease_s: float
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        """This one, from now on."""
        lease_s = progress.seconds_of(VARIABLE, LEASE_S)
        since = time.strftime(_TIME, time.gmtime())
        return cls(os.getpid(), socket.gethostname(), _boot(), since, lease_s, uuid.uuid4().hex)

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


def read_owner(file: IO[str]) -> Owner | None:
    """The owner that the file names; None when it names none, or was being written when its process was killed."""
    file.seek(0)
    try:
        known = json.loads(file.read())
        return Owner(**{each.name: known[each.name] for each in fields(Owner)})
    except (ValueError, TypeError, KeyError):
        return None


def _boot() -> str:
    """What names the running kernel: drawn at its start, the same in all containers on it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""
