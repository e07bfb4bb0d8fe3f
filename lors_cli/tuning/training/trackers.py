"""Where the numbers of each step go besides `log.jsonl`.

A tracker is a function that takes named numbers and their step. To add one: a context manager that makes it, a line in
`TRACKERS`, its name in the recipe's schema. A library is imported where it is asked for, and nowhere else.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lors_cli.errors import MissingError
from lors_cli.files import atomic
from lors_cli.files.hashes import flat
from lors_cli.machine import processes
from lors_cli.output import console
from lors_cli.tuning.training.randomness import random_state, restore_random_state

Tracker = Callable[[dict[str, float], int], object]
PROJECT = "LORS"
IDS_NAME = "trackers.json"
NAMES = {
    "loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
    "epoch": "train/epoch", "tokens_per_s": "train/tokens_per_s", "val_loss": "eval/loss",
}  # fmt: skip
"""What a row of the log has, by the names that transformers' Trainer gives it."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Args:
        name: for people.
        config: plain data.
        folder: for what a tracker writes here.
        work: the stage's folder for resumable state, in which a run's ids at its trackers are kept.
    """

    name: str
    config: dict[str, Any]
    folder: Path
    work: Path

    def kept_id(self, tracker: str, make: Callable[[], str]) -> str:
        """This run's id at a tracker, made once."""
        ids = self._ids()
        if tracker not in ids:
            ids[tracker] = make()
            atomic.write_json(self.work / IDS_NAME, ids)
        return ids[tracker]

    def known_id(self, tracker: str) -> str | None:
        """This run's id at a tracker, None before it has one."""
        return self._ids().get(tracker)

    def _ids(self) -> dict[str, str]:
        found = atomic.read_json(self.work / IDS_NAME)
        return found if isinstance(found, dict) else {}


@contextmanager
def tracking(names: Sequence[str], run: TrackedRun, first_step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes the rows of the log, from `first_step` on, for all the trackers; in the main process alone.

    Training draws the random numbers that it would draw without them. A tracker that has begun and fails is given up
    with a warning; one that cannot begin is refused.
    """
    trackers: dict[str, Tracker] = {}

    @contextmanager
    def outlived(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if trackers.pop(name, None):
                console.warn(f"report_to: {name} fails and is told nothing more; log.jsonl has every step: {error}")

    def tell(row: dict[str, Any]) -> None:
        values = {name: row[key] for key, name in NAMES.items() if row.get(key) is not None}
        for name, tracker in [*trackers.items()]:
            with outlived(name):
                tracker(values, row["step"])

    def close(name: str, tracker: AbstractContextManager[Tracker], *error: Any) -> None:
        with outlived(name):
            tracker.__exit__(*error)

    with ExitStack() as opened:

        def begin() -> None:
            state = random_state()
            for name in names if processes.is_main() else ():
                tracker = TRACKERS[name](run, first_step)
                trackers[name] = tracker.__enter__()
                opened.push(partial(close, name, tracker))
            restore_random_state(state)

        processes.from_main(begin)
        yield tell


@contextmanager
def _tensorboard(run: TrackedRun, first_step: int) -> Iterator[Tracker]:
    """Scalars in event files; those of steps that are done again are dropped when they are read."""
    from torch.utils.tensorboard import SummaryWriter

    def add(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    with SummaryWriter(run.folder / "tensorboard", purge_step=first_step) as writer:
        writer.add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```", first_step)
        yield add


@contextmanager
def _wandb(run: TrackedRun, first_step: int) -> Iterator[Tracker]:
    """Weights & Biases; offline, logged in and so on by its own environment variables."""
    import wandb

    number = run.kept_id("wandb", lambda: uuid.uuid4().hex)
    try:
        there = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", run.name),
            id=number, resume="allow", dir=os.environ.get("WANDB_DIR", str(run.folder)), config=run.config,
        )  # fmt: skip
    except wandb.Error as error:
        hint = "Log in with `wandb login`, or set WANDB_MODE=offline and send it later with `wandb sync`."
        raise MissingError(f"report_to: wandb cannot begin: {error}", hint) from error
    with there:
        step_name = "train/global_step"  # rows that come twice do no harm
        there.define_metric("*", step_metric=step_name, step_sync=True)
        yield lambda values, step: there.log({**values, step_name: step})


@contextmanager
def _mlflow(run: TrackedRun, first_step: int) -> Iterator[Tracker]:
    """MLflow, at the server or in the folder that its own environment variables name."""
    import mlflow

    try:
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        known = run.known_id("mlflow")
        active = mlflow.start_run(run_id=known, run_name=run.name)
        if known is None:  # it refuses other ones later, and a run may go on with another save_steps
            mlflow.log_params(dict(flat(run.config)))
            run.kept_id("mlflow", lambda: active.info.run_id)
    except mlflow.MlflowException as error:
        raise MissingError(f"report_to: mlflow cannot begin: {error}", "Look at MLFLOW_TRACKING_URI.") from error
    with active:
        yield lambda values, step: mlflow.log_metrics(values, step=step)


@contextmanager
def _trackio(run: TrackedRun, first_step: int) -> Iterator[Tracker]:
    """trackio, which knows a run by its name."""
    import trackio

    name = run.kept_id("trackio", lambda: f"{run.name}-{uuid.uuid4().hex[:8]}")
    trackio.init(project=PROJECT, name=name, resume="allow", config=dict(flat(run.config)))
    try:
        yield lambda values, step: trackio.log(values, step=step)
    finally:
        trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun, int], AbstractContextManager[Tracker]]] = {
    "wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow, "trackio": _trackio,
}  # fmt: skip
