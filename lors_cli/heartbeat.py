"""A sign of life from long work whose log is a file: a line now and then, also while nothing advances."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lors_cli.errors import UsageError

VARIABLE = "LORS_HEARTBEAT_S"
DEFAULT_S = 60.0


def interval_s() -> float:
    """Seconds between lines: $LORS_HEARTBEAT_S, else 60.

    Raises:
        UsageError: it is no number above 0.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return DEFAULT_S
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < threading.TIMEOUT_MAX:
        raise UsageError(f"${VARIABLE} is {text}; it must be a number of seconds above 0.")
    return value


@contextmanager
def beating(beat: Callable[[], float]) -> Iterator[None]:
    """Call `beat` from a thread of its own for as long as the context lasts.

    Args:
        beat: returns the seconds until its next call.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(beat()):
            pass

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
