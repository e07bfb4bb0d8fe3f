"""Run and stage folders: whose they are, who holds them, what is swept away."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lors_cli.errors import UsageError
from lors_cli.files import atomic, hashes, locks, records
from lors_cli.machine import processes
from lors_cli.pipeline.plans import StagePlan

MARKS = {
    "run": {"recipe.yaml", "manifest.json"},
    "sweep": {"sweep.yaml", "sweep.json"},
    "stage": {
        records.RECORD_NAME, records.WORK_NAME, records.STAGING_NAME, records.JOURNAL_NAME, ".pieces", ".scratch",
    },
}  # fmt: skip
"""By kind of folder, the names that show that it was made here."""

UNFINISHED = (records.WORK_NAME, records.STAGING_NAME, "checkpoints", ".pieces")
"""What an interrupted stage leaves in its folder to go on with."""


def guard_out(out: Path, stage: str, inputs: Iterable[str] = ()) -> None:
    """Refuse to write into a folder that holds something else.

    Args:
        stage: prune, tune, eval, merge; or run or sweep for the folder of a whole one.
        inputs: the models that are read.

    Raises:
        UsageError: it is a file, a model that is read, another stage's result or a folder of others' files, or has a
            name that is not UTF-8.
    """
    hashes.check_name(out.absolute())
    elsewhere = "Choose another --out."
    if not out.is_dir():
        above = next((folder for folder in (out, *out.parents) if folder.exists()), Path())
        if not above.is_dir():
            raise UsageError(f"{above} is a file; --out must be a folder.", elsewhere)
        return
    if any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise UsageError(f"--out {out} is the model's own folder; results go to another.", elsewhere)
    names = {path.name for path in out.iterdir() if not atomic.is_partial(path)} - {locks.LOCK_NAME}
    record = records.read_record(out)
    if record is not None and record.stage != stage:
        raise UsageError(f"{out} holds the results of {record.stage}, which would be overwritten.", elsewhere)
    for kind in ("run", "sweep"):
        if stage != kind and record is None and names & MARKS[kind]:
            raise UsageError(f"{out} is a {kind}'s folder; a {stage}'s results go to their own.", elsewhere)
    if names and not names & MARKS.get(stage, MARKS["stage"]):
        raise UsageError(f"{out} holds other files; results are not mixed with them.", elsewhere)


@contextmanager
def claim(out: Path, *, wait_s: float | None = None) -> Iterator[None]:
    """Hold `out` for this process; a folder made for it goes again when nothing was written there.

    Of several processes on one job the first one holds it for all. One that is in use is refused, or looked at every
    `wait_s` seconds until it is free.
    """
    if not processes.is_main():
        yield
        return
    fresh = not out.exists()
    with locks.hold(out, wait_s=wait_s):
        try:
            yield
        finally:
            if fresh and out.is_dir() and [path.name for path in out.iterdir()] == [locks.LOCK_NAME]:
                shutil.rmtree(out)


def tidy(folder: Path) -> None:
    """Remove what a killed process left beside a finished stage's results."""
    if processes.is_main() and records.leftovers(folder):
        with claim(folder):
            atomic.remove(records.leftovers(folder))


def forget(plan: StagePlan) -> None:
    """Make a finished or begun stage undone, for --force."""
    records.undo(plan.folder)
    for name in UNFINISHED:
        shutil.rmtree(plan.folder / name, ignore_errors=True)
