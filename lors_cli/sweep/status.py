"""How far a sweep is: the state of every stage of its cells, as it lies on disk and in a cluster's queue."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lors_cli.files import locks
from lors_cli.pipeline.plans import StagePlan
from lors_cli.sweep.cells import Cell, Sweep
from lors_cli.sweep.job_folder import JobFolder
from lors_cli.sweep.slurm import queued
from lors_cli.sweep.stages import CellPlan, distinct, plan_cells


def sweep_status(sweep: Sweep, out: Path, chosen: Sequence[Cell]) -> dict[str, Any]:
    """Each chosen cell's stages with their state: done, running, waiting or failed; nothing is written."""
    plans = plan_cells(chosen, out)
    jobs = JobFolder.of(out, sweep)
    submitted = {folder: jobs.submission(folder.name) for folder in distinct(plans)}
    asks = any(submitted.values()) and shutil.which("squeue") is not None
    queue = queued() if asks else None
    states = {
        folder: _state(plan, jobs, submitted[folder], queue) for folder, (plan, _) in distinct(plans).items()
    }  # fmt: skip
    cells = [
        {
            "name": plan.cell.name,
            "status": _of_cell(plan, states),
            "stages": [states[stage.folder] for stage in plan.plans],
        }
        for plan in plans
    ]
    return {"name": sweep.name, "sweep": str(out), "cells": cells}


def _state(
    plan: StagePlan, jobs: JobFolder, submitted: dict[str, Any] | None, queue: dict[str, str] | None
) -> dict[str, Any]:
    """A stage's state, and what is to be said of it."""
    name = plan.folder.name
    owner, failure, number = locks.holder(plan.folder), jobs.failure(name), submitted["id"] if submitted else None
    in_queue = queue.get(number) if queue is not None and number is not None else None
    last = jobs.last_line(name)
    if plan.status == "done":
        status, detail = "done", ""
    elif owner is not None:
        status, detail = "running", last or str(owner)
    elif failure is not None:
        status, detail = "failed", failure["message"]
    elif in_queue is not None:
        status, detail = "waiting", f"job {number}, {in_queue.lower()}"
    elif number is not None and queue is not None and last:
        status, detail = "failed", f"job {number} ended without a word: {last}"
    else:
        status, detail = "waiting", "begun" if plan.status == "resume" else ""
    return {
        "stage": plan.label, "status": status, "detail": detail, "last_line": last, "job": number,
        "folder": str(plan.folder),
    }  # fmt: skip


def _of_cell(plan: CellPlan, states: dict[Path, dict[str, Any]]) -> str:
    found = {states[stage.folder]["status"] for stage in plan.plans}
    return next(state for state in ("failed", "running", "waiting", "done") if state in found)
