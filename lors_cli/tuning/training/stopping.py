"""Ctrl-C and schedulers' signals during training: a saved stop instead of a lost step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from lors_cli.machine import processes
from lors_cli.machine.signals import STOPPING, Stopped
from lors_cli.output import console
from lors_cli.tuning.training.randomness import random_state, restore_random_state


class StopCallback(TrainerCallback):
    """After a Ctrl-C or a scheduler's signal: finish the micro-batch, save the last whole step, stop."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that asked for it."""
        self.agreed = False
        """All processes know in the same step that one of them was asked."""
        self._random_state: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the generators' state, which a step that is given up must leave as it was."""
        self._random_state = random_state()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give up the step; it is done again from its start when the run goes on."""
        if self.asked and processes.num_processes() == 1:  # several processes stop together, after a step
            restore_random_state(self._random_state)
            control.should_save = control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop, where that is wanted."""
        self._random_state = random_state()  # before the next epoch's order of samples is drawn
        if self.agreed if processes.num_processes() > 1 else self.asked:
            control.should_save = True
            control.should_training_stop = True


@contextlib.contextmanager
def stopping_gently(callback: StopCallback) -> Iterator[None]:
    """Turn the first Ctrl-C, SIGTERM or SIGUSR1 into a saved stop that ends in KeyboardInterrupt.

    A Ctrl-C after it stops at once; schedulers send their signals more than once.
    """

    def ask(number: int, frame: Any) -> None:
        if callback.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not callback.asked:
            callback.asked = number
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
    if processes.anyone(bool(callback.asked)):
        raise Stopped(callback.asked) if callback.asked in STOPPING else KeyboardInterrupt
