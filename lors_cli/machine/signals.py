"""SIGTERM and SIGUSR1, as schedulers send them: the command ends as after a Ctrl-C, what is finished is kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A scheduler asked this process to end, by the signal of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.name = signal.Signals(number).name


@contextmanager
def stopping() -> Iterator[None]:
    """Turn the first SIGTERM or SIGUSR1 into `Stopped`, and pass over more of them while the command winds up.

    Signals that someone else handles or ignores are left to them, as all are outside the main thread.
    """
    asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Stopped(number)

    taken = []
    try:
        for number in STOPPING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, stop)
                taken.append(number)
    except ValueError:  # not the main thread
        taken = []
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
