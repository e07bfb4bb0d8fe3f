"""Ctrl-C and schedulers' signals during training: a saved stop instead of a lost step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lors_cli.machine import processes
from lors_cli.machine.signals import STOPPING, Stopped
from lors_cli.output import console


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    asked: int | None = None
    """The signal that asked for it."""


@contextlib.contextmanager
def stopping_gently(stop: StopRequest) -> Iterator[None]:
    """Turn the first Ctrl-C, SIGTERM or SIGUSR1 into a saved stop that ends in KeyboardInterrupt.

    A Ctrl-C after it stops at once; schedulers send their signals more than once.
    """

    def ask(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.asked:
            stop.asked = number
            console.warn("stopping: after this micro-batch a checkpoint is saved; Ctrl-C (again) stops at once")

    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    try:
        for signum in (signal.SIGINT, *STOPPING):
            before[signum] = signal.signal(signum, ask)
    except ValueError:  # not the main thread: the caller's own handling stays
        before = {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if processes.anyone(bool(stop.asked)):
        raise Stopped(stop.asked) if stop.asked in STOPPING else KeyboardInterrupt
