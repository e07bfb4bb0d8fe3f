"""`spread_sweep`: a sweep whose stages are processes of their own, on this machine or on a cluster.

Several commands may do so with one sweep at once: they share its stages, and each sees what the others finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lors_cli.errors import UsageError
from lors_cli.files import atomic, locks
from lors_cli.output import console, progress
from lors_cli.pipeline.folders import guard_out
from lors_cli.sweep.cells import Cell, Sweep
from lors_cli.sweep.index import index, write_index
from lors_cli.sweep.job_folder import INDEX_PATIENCE_S, INDEX_WAIT_S, JobFolder
from lors_cli.sweep.jobs import Job, jobs_of
from lors_cli.sweep.running import one_process, summary, warn_of_disk
from lors_cli.sweep.stages import CellPlan, plan_cells

Told = Callable[[Job, str], None]
"""Called when a job is started, done or failed."""


class Executor(Protocol):
    """What does jobs."""

    def run(self, jobs: Sequence[Job], folder: JobFolder, told: Told) -> None:
        """Do all jobs but those whose results others lack; what fails is noted in `folder`."""


def spread_sweep(sweep: Sweep, out: Path, chosen: Sequence[Cell], executor: Executor) -> dict[str, Any]:
    """Run the chosen cells of a sweep by `executor`; its summary is as of `run_sweep`."""
    from lors_cli.report.sweep import write_sweep_report

    one_process()
    guard_out(out, "sweep")
    for cell in chosen:
        if cell.recipe.model.device.startswith("cuda:"):
            raise UsageError(
                f"model.device: {cell.recipe.model.device} would be every process's (cell {cell.name}).",
                "Leave it out: each process takes the GPU that it is given.",
            )
    plans, names = plan_cells(sweep.cells, out), {cell.name for cell in chosen}
    warn_of_disk(plans, names, out)
    with locks.hold(out, wait_s=INDEX_WAIT_S, patience_s=INDEX_PATIENCE_S):
        write_index(out, index(sweep, plans, out), sweep.text)
    jobs = jobs_of(plans, names)
    folder = JobFolder.of(out, sweep)
    watch = _Watch(folder, len(jobs))
    if jobs:
        if not folder.text.is_file():
            atomic.write_text(folder.text, sweep.text)
        for job in jobs:
            folder.clear_failure(job.name)
        try:
            executor.run(jobs, folder, watch.told)
        finally:
            folder.update_index()
    plans = plan_cells(sweep.cells, out)
    with locks.hold(out, wait_s=INDEX_WAIT_S):
        content = index(sweep, plans, out)
        failed = {plan.cell.name: failure for plan in plans if (failure := _failure(plan, folder)) is not None}
        for entry in content["cells"]:
            if entry["name"] in failed:
                entry.update(status="failed", error=failed[entry["name"]]["message"])
        write_index(out, content, sweep.text)
        reports = write_sweep_report(out)
    mine = {name: failure for name, failure in failed.items() if name in names}
    return summary(out, content, watch.log, mine, reports)


def _failure(plan: CellPlan, folder: JobFolder) -> dict[str, Any] | None:
    """Why a cell is not done."""
    left = (stage.folder.name for stage in plan.plans if stage.status != "done")
    return next((failure for name in left if (failure := folder.failure(name)) is not None), None)


@dataclass
class _Watch:
    """What is said of jobs while they run, and those that were done."""

    folder: JobFolder
    total: int
    log: list[dict[str, Any]] = field(default_factory=list)
    _started: dict[str, float] = field(default_factory=dict)
    _over: int = 0

    def told(self, job: Job, state: str) -> None:
        """A job was started, is done or failed."""
        elapsed_s = time.monotonic() - self._started.setdefault(job.name, time.monotonic())
        if state == "started":
            console.info(f"  {job.label}: started, log in {self.folder.log(job.name)}")
            return
        self._over += 1
        head = f"[{self._over}/{self.total}] {job.label}"
        if state == "done":
            console.heading(f"{head}: done after {progress.duration(elapsed_s)}")
            self.log.append({"stage": job.plan.stage, "cell": job.cell, "folder": str(job.plan.folder),
                             "elapsed_s": round(elapsed_s, 2)})  # fmt: skip
            return
        failure = self.folder.failure(job.name)
        console.error(f"{head}: {failure['message'] if failure else 'failed'}")
