"""Training checkpoints: adapters and the loop's own state, never the base; they appear whole, by rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lors_cli.files import atomic
from lors_cli.output import console
from lors_cli.tuning.adapter import WEIGHTS_NAME

MARKER_NAME = "lors.json"
OPTIMIZER_NAME, SCHEDULE_NAME, RANDOM_NAME, STATE_NAME = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
)  # fmt: skip
PARTIAL_NAME = ".partial"


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done by then."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def whole_checkpoints(folder: Path, fingerprint: str) -> list[Path]:
    """The complete checkpoints of the stage with this fingerprint, oldest first; others are passed over.

    One that speaks of an earlier, best one is complete while that is there.
    """
    needed = (WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULE_NAME, RANDOM_NAME, STATE_NAME)
    found: dict[Path, int | None] = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        marker = atomic.read_json(path / MARKER_NAME)
        if not isinstance(marker, dict) or marker.get("fingerprint") != fingerprint:
            continue
        if path.name.removeprefix("checkpoint-").isdecimal() and all((path / name).is_file() for name in needed):
            found[path] = marker.get("best_step")
    there = set(map(step_of, found))
    return sorted((path for path, best in found.items() if best is None or best in there), key=step_of)


def latest_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The newest complete checkpoint of this stage, or None."""
    found = whole_checkpoints(folder, fingerprint)
    return found[-1] if found else None


def write_checkpoint(
    folder: Path, step: int, marker: dict[str, Any], write: Callable[[Path], None], *, keep: int
) -> None:
    """Add a checkpoint, and keep so many of the newest, and their best.

    Where a whole one of that step lies, its marker alone is replaced: a stop within an evaluation left one without
    its outcome.

    `marker` holds the stage's `fingerprint`, the `best_step` that is to stay, and what else is to be known; `write`
    puts the files into a folder.
    """
    partial, target = folder / PARTIAL_NAME / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    if target in whole_checkpoints(folder, marker["fingerprint"]):
        atomic.write_json(target / MARKER_NAME, marker)
    else:
        shutil.rmtree(partial.parent, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        atomic.write_json(partial / MARKER_NAME, marker)
        for file in partial.iterdir():
            atomic.sync_file(file)
        atomic.sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        atomic.sync_folder(folder)
        shutil.rmtree(partial.parent)
    whole = whole_checkpoints(folder, marker["fingerprint"])
    best = {(atomic.read_json(path / MARKER_NAME) or {}).get("best_step") for path in whole[-keep:]}
    for old in whole[:-keep]:
        if step_of(old) not in best:
            shutil.rmtree(old)


def begin_anew_in(folder: Path, fingerprint: str, dtype: str) -> None:
    """Remove the checkpoints of this stage if they are of a run in another number format: `dtype: auto` is the
    machine's. Those of earlier versions do not say theirs."""
    last = latest_checkpoint(folder, fingerprint)
    begun = (atomic.read_json(last / MARKER_NAME) or {}).get("dtype") if last else None
    if begun not in (None, dtype):
        console.warn(f"the earlier call computed in {begun}, this one in {dtype}: tuning begins anew.")
        shutil.rmtree(folder)


def remove_others(folder: Path, fingerprint: str) -> None:
    """Remove checkpoints that are half written or belong to other settings."""
    ours = whole_checkpoints(folder, fingerprint)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path not in ours:
            shutil.rmtree(path)
